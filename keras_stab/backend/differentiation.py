"""Values and gradients of functions of one scalar."""

import functools

import keras

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
    import jax.numpy as jnp
elif BACKEND == "torch":
    import torch


def value_and_gradients(function, values):
    """Evaluates `function(values) -> (scalar, aux)` and differentiates it.

    Returns `(scalar, aux), gradients`; a gradient is `None` where the scalar
    does not depend on the value (never on JAX, where it is zero).
    """
    if BACKEND == "jax":
        return jax.value_and_grad(function, has_aux=True)(values)
    if BACKEND == "tensorflow":
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            scalar, aux = function(values)
        return (scalar, aux), tape.gradient(scalar, values)
    with torch.enable_grad():
        leaves = leaves_of(values)
        scalar, aux = function(leaves)
        gradients = torch.autograd.grad(scalar, leaves, allow_unused=True)
    return (scalar.detach(), detached(aux)), list(gradients)


def value_gradients_and_pullback(function, values):
    """As `value_and_gradients`, with a second way back through the outputs.

    Args:
        function: `function(values) -> (scalar, (outputs, aux))`, outputs a
            list of float tensors.

    Returns:
        `(scalar, aux), gradients, pull`: `pull(cotangents)` gives the
        gradients of `sum <output, cotangent>` without another forward pass.
    """
    if BACKEND == "jax":

        def flat(values):
            scalar, (outputs, aux) = function(values)
            return (scalar, outputs), aux

        (scalar, outputs), vjp, aux = jax.vjp(flat, values, has_aux=True)
        zeros = [jnp.zeros_like(o) for o in outputs]
        (gradients,) = vjp((jnp.ones_like(scalar), zeros))

        def pull(cotangents):
            return vjp((jnp.zeros_like(scalar), cotangents))[0]

        return (scalar, aux), gradients, pull
    if BACKEND == "tensorflow":
        with tf.GradientTape(
            persistent=True, watch_accessed_variables=False
        ) as tape:
            tape.watch(values)
            scalar, (outputs, aux) = function(values)

        def pull(cotangents):
            return tape.gradient(outputs, values, output_gradients=cotangents)

        return (scalar, aux), tape.gradient(scalar, values), pull
    with torch.enable_grad():
        leaves = leaves_of(values)
        scalar, (outputs, aux) = function(leaves)
        gradients = torch.autograd.grad(
            scalar, leaves, allow_unused=True, retain_graph=True
        )

    def pull(cotangents):
        pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
        outputs_used, given = zip(*pairs)
        return list(
            torch.autograd.grad(outputs_used, leaves, given, allow_unused=True)
        )

    return (scalar.detach(), detached(aux)), list(gradients), pull


def gradient_of_sum(function, x):
    """The gradient of `sum(function(x))`, itself to be differentiated.

    Only by the argument: `x` that is used from outside is a constant. What
    layers write in `function` stays written, once.
    """
    if BACKEND == "jax":
        return _gradient_beside_writes(function, x)
    if BACKEND == "tensorflow":
        x = tf.identity(x)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            outputs = function(x)
        return tape.gradient(outputs, x, unconnected_gradients="zero")
    # Keras evaluates without gradients, and then nothing needs a second one.
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        total = function(x).sum()
        if not total.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(
            total, [x], create_graph=again, allow_unused=True
        )
    return torch.zeros_like(x) if gradient is None else gradient


class _Writes(keras.StatelessScope):
    """A scope that knows the variables that were assigned in it."""

    def __init__(self):
        super().__init__()
        self.written = {}

    def add_update(self, update):
        super().add_update(update)
        self.written[id(update[0])] = update[0]


def _gradient_beside_writes(function, x):
    """On JAX: no value that is being differentiated may stay in a variable."""
    with _Writes() as own:
        outer = own.original_scope
    scope = own if outer is None else outer
    before = dict(scope.state_mapping)

    def total(x):
        if outer is None:
            with own:
                value = jnp.sum(function(x))
        else:
            value = jnp.sum(function(x))
        known = scope.state_mapping
        return value, {
            key: known[key]
            for key in known
            if known[key] is not before.get(key)
        }

    gradient, written = jax.grad(total, has_aux=True)(x)
    scope.state_mapping.update(written)
    for key, variable in own.written.items():
        variable.assign(written[key])
    return gradient


def gradients_at_taps(function):
    """Gradients for tensors inside a computation, not for its inputs.

    Args:
        function: `function(tap) -> (scalar, aux)`. It passes a tensor through
            `tap(tensor)` where the gradient is wanted, and goes on with the
            result. Weights must enter as constants.

    Returns:
        `(scalar, aux), gradients`, one gradient per tap in the order of the
        calls; `None` where the scalar does not depend on it (zero on JAX).
    """
    if BACKEND == "jax":
        shapes = []

        def trace():
            def tap(tensor):
                shapes.append(jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))
                return tensor

            function(tap)

        jax.eval_shape(trace)

        def shifted(shifts):
            remaining = iter(shifts)
            return function(lambda tensor: tensor + next(remaining))

        zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        return jax.value_and_grad(shifted, has_aux=True)(zeros)
    taps = []
    if BACKEND == "tensorflow":
        with tf.GradientTape(watch_accessed_variables=False) as tape:

            def tap(tensor):
                tensor = tf.identity(tensor)
                tape.watch(tensor)
                taps.append(tensor)
                return tensor

            scalar, aux = function(tap)
        gradients = tape.gradient(scalar, taps)
        return (scalar, aux), [tracing.densify(g) for g in gradients]
    with torch.enable_grad():

        def tap(tensor):
            tensor = tensor.view_as(tensor)
            if not tensor.requires_grad:
                tensor.requires_grad_()
            taps.append(tensor)
            return tensor

        scalar, aux = function(tap)
        if scalar.requires_grad:
            gradients = torch.autograd.grad(scalar, taps, allow_unused=True)
        else:
            gradients = [None] * len(taps)
    return (scalar.detach(), detached(aux)), list(gradients)


def noticing_gradient(weight, notice):
    """The same tensor; TensorFlow calls `notice()` if its gradient is made."""
    if BACKEND != "tensorflow":
        return weight

    @tf.custom_gradient
    def passed(weight):
        def gradient(upstream):
            notice()
            return upstream

        return tf.identity(weight), gradient

    return passed(weight)


def noticing_dependence(loss, notice):
    """The same scalar; `notice()` is called if it depends on weights.

    By JAX while the loss is differentiated, by PyTorch at once.
    """
    if BACKEND == "torch" and loss.requires_grad:
        notice()
    if BACKEND != "jax":
        return loss

    @jax.custom_jvp
    def passed(loss):
        return loss

    @functools.partial(passed.defjvp, symbolic_zeros=True)
    def differentiated(primals, tangents):
        (loss,), (tangent,) = primals, tangents
        if isinstance(tangent, jax.custom_derivatives.SymbolicZero):
            return loss, jnp.zeros_like(loss)
        notice()
        return loss, tangent

    return passed(loss)


def leaves_of(values):
    """Tensors to take gradients for, on PyTorch.

    At the current weights these are the parameters themselves, so that
    wrapped torch modules, which read no scope, are differentiated too.
    """
    return [
        v if v.requires_grad else v.detach().requires_grad_() for v in values
    ]


def detached(structure):
    """The same tensors, on PyTorch, without the way they were made."""
    if torch.is_tensor(structure):
        # What is a constant already stays the same object.
        return structure.detach() if structure.requires_grad else structure
    # By hand: for a small step keras.tree takes as long as an operation.
    if isinstance(structure, list):
        return [detached(part) for part in structure]
    if isinstance(structure, tuple):
        parts = (detached(part) for part in structure)
        named = hasattr(structure, "_fields")
        return type(structure)(*parts) if named else tuple(parts)
    if not keras.tree.is_nested(structure):
        return structure
    return keras.tree.map_structure(
        lambda t: t.detach() if torch.is_tensor(t) else t, structure
    )


def constant(value):
    """The same tensor, a constant to differentiation."""
    if BACKEND == "torch":  # without the checks of Keras
        return value.detach()
    return keras.ops.stop_gradient(value)
