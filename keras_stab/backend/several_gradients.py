"""Gradients of several scalars, of one evaluation."""

from keras_stab.backend.devices import BACKEND
from keras_stab.backend.differentiation import detached
from keras_stab.backend.differentiation import leaves_of

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
    import jax.numpy as jnp
elif BACKEND == "torch":
    import torch


def values_and_gradients(function, values):
    """Evaluates `function(values) -> (scalars, aux)` and differentiates each.

    What is not finite behind one scalar is in the gradients of no other.

    Args:
        function: Returns a list of scalars, and anything else.
        values: List of tensors.

    Returns:
        `(scalars, aux), gradients`: for each scalar a list with a gradient for
        each value; `None` where the scalar does not depend on it (never on
        JAX, where it is zero).
    """
    if BACKEND == "jax":
        scalars, linear, aux = jax.linearize(function, values, has_aux=True)

        def gradient(k):
            # One output alone is transposed. With a cotangent of 0 for the
            # others, what is infinite behind them would make NaN of it.
            pull = jax.linear_transpose(lambda t: linear(t)[k], values)
            return pull(jnp.ones_like(scalars[k]))[0]

        each = [gradient(k) for k in range(len(scalars))]
        return (scalars, aux), each
    if BACKEND == "tensorflow":
        with tf.GradientTape(
            persistent=True, watch_accessed_variables=False
        ) as tape:
            tape.watch(values)
            scalars, aux = function(values)
        return (scalars, aux), [tape.gradient(s, values) for s in scalars]
    with torch.enable_grad():
        leaves = leaves_of(values)
        scalars, aux = function(leaves)
        each = [
            list(
                torch.autograd.grad(
                    scalar, leaves, allow_unused=True, retain_graph=True
                )
            )
            if scalar.requires_grad
            else [None] * len(leaves)
            for scalar in scalars
        ]
    return (detached(scalars), detached(aux)), each
