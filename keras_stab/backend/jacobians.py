"""Products of vectors with Jacobians and Hessians."""

import contextlib

import keras

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND
from keras_stab.backend.differentiation import leaves_of

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch


def vector_jacobian(function, values, cotangents):
    """The gradient of `sum <output, cotangent>` by the values.

    Args:
        function: From a list of tensors to a list of tensors.
        values: List of tensors.
        cotangents: One tensor per output, `None` for an output to leave out.
    """
    used = [i for i, c in enumerate(cotangents) if c is not None]
    given = [cotangents[i] for i in used]

    def chosen(values):
        outputs = function(values)
        return [outputs[i] for i in used]

    if BACKEND == "jax":
        outputs, pull = jax.vjp(chosen, values)
        given = [g.astype(o.dtype) for g, o in zip(given, outputs)]
        return pull(given)[0]
    if BACKEND == "tensorflow":
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            outputs = chosen(values)
        given = [tf.cast(g, o.dtype) for g, o in zip(given, outputs)]
        gradients = tape.gradient(outputs, values, output_gradients=given)
        return [tracing.densify(g) for g in gradients]
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in values]
        outputs = chosen(leaves)
        pairs = [(o, g) for o, g in zip(outputs, given) if o.requires_grad]
        if not pairs:
            return [None] * len(leaves)
        outputs = [o for o, _ in pairs]
        given = [g.to(o.dtype) for o, g in pairs]
        return list(
            torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        )


def vector_jacobians(function, values, groups, arguments, cotangents):
    """As `vector_jacobian` for every group, in one call by `torch.vmap`.

    For PyTorch, where a call for each is a launch for each.

    Args:
        function: From a list of values and a list of arguments to a list of
            tensors; it is run on those of one group.
        values: List of tensors, the same for all groups.
        groups: Int, K.
        arguments: List of tensors `(K, ...)`.
        cotangents: One tensor `(K, ...)` per output, or `None`.

    Returns:
        One tensor `(K, *value.shape)` per value; `None` where no output
        depends on it.
    """
    with torch.enable_grad():
        # A leaf for every group: the gradients are then taken outside of the
        # call, where it is known which of them are missing.
        leaves = [
            v.detach().expand(groups, *v.shape).requires_grad_() for v in values
        ]
        outputs = torch.vmap(function, randomness="error")(leaves, arguments)
    pairs = [
        (o, c.to(o.dtype))
        for o, c in zip(outputs, cotangents)
        if c is not None and o.requires_grad
    ]
    if not pairs:
        return [None] * len(leaves)
    outputs, given = zip(*pairs)
    return torch.autograd.grad(outputs, leaves, given, allow_unused=True)


def hessian_vector_product(function, values, vectors):
    """The Hessian of `function(values) -> scalar`, times vectors.

    Returns a list of dense tensors, zero where the gradient does not depend
    on a value.
    """
    if BACKEND == "jax":
        gradient = jax.grad(function)
        try:
            return jax.jvp(gradient, (values,), (vectors,))[1]
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            # A layer defines its own gradient, which has no forward mode.
            return jax.vjp(gradient, values)[1](vectors)[0]
    if BACKEND == "tensorflow":
        with (
            _moments_of_second_order(),
            tf.GradientTape(watch_accessed_variables=False) as outer,
        ):
            outer.watch(values)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(values)
                scalar = function(values)
            gradients = [
                tracing.densify(g) for g in inner.gradient(scalar, values)
            ]
        pairs = [(g, v) for g, v in zip(gradients, vectors) if g is not None]
        present, given = zip(*pairs) if pairs else ((), ())
        products = outer.gradient(
            list(present), values, output_gradients=list(given)
        )
    else:
        # The fast kernels of attention have no second derivative.
        plain = torch.nn.attention.SDPBackend.MATH
        with torch.enable_grad(), torch.nn.attention.sdpa_kernel(plain):
            leaves = leaves_of(values)
            scalar = function(leaves)
            gradients = [None] * len(leaves)
            if scalar.requires_grad:
                gradients = torch.autograd.grad(
                    scalar, leaves, create_graph=True, allow_unused=True
                )
            pairs = [
                (g, v)
                for g, v in zip(gradients, vectors)
                if g is not None and g.requires_grad
            ]
            products = [None] * len(leaves)
            if pairs:
                present, given = zip(*pairs)
                products = torch.autograd.grad(
                    present, leaves, given, allow_unused=True
                )
    return [
        keras.ops.zeros_like(value)
        if product is None
        else tracing.densify(product)
        for value, product in zip(values, products)
    ]


@contextlib.contextmanager
def _moments_of_second_order():
    """Makes `tf.nn.moments`, which Keras normalises with, differentiable twice.

    TensorFlow's own takes the mean inside the variance as a constant. That
    leaves the gradient right and makes its derivative wrong.
    """

    def moments(x, axes, shift=None, name=None, keepdims=False):
        del shift, name
        mean = tf.reduce_mean(x, axes, keepdims=True)
        squares = tf.math.squared_difference(x, mean)
        variance = tf.reduce_mean(squares, axes, keepdims=keepdims)
        return mean if keepdims else tf.squeeze(mean, axes), variance

    stock, tf.nn.moments = tf.nn.moments, moments
    try:
        yield
    finally:
        tf.nn.moments = stock
