"""Normalisation of several groups at once, each by its own statistics.

The gradient is written out. That is a third of the passes over a tensor that
PyTorch would make, and spares XLA a layout of its own for every sum.
"""

import functools

import keras

from keras_stab.backend.devices import BACKEND
from keras_stab.backend.products import highest_precision

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch


def normalise_groups(x, scale, offset, epsilon):
    """Each group and channel with mean 0 and variance 1, then scaled.

    Args:
        x: Tensor `(K, n, C, p)`: the channels of group k have `n p` elements.
        scale, offset: Tensors `(K, C)`, or `None`.
        epsilon: Float, added to the variance.

    Returns:
        A tensor of the shape of `x`; means and biased variances, `(K, C)`.
    """
    if BACKEND == "torch":
        scale, offset = (
            None if t is None else t[:, None, :, None] for t in (scale, offset)
        )
        out, *moments = _NormaliseGroups.apply(x, scale, offset, epsilon)
    else:
        shape = (x.shape[0], x.shape[2])
        if scale is None:
            scale = keras.ops.ones(shape, x.dtype)
        if offset is None:
            offset = keras.ops.zeros(shape, x.dtype)
        scale, offset = scale[:, None, :, None], offset[:, None, :, None]
        normalise = _in_jax if BACKEND == "jax" else _in_tensorflow
        out, *moments = normalise(x, scale, offset, epsilon)
    return out, *(m[:, 0, :, 0] for m in moments)


def _forward(x, scale, offset, epsilon):
    """The outputs, and what `_backward` needs."""
    count = x.shape[1] * x.shape[3]
    mean = _sum(x) / count
    centred = x - mean
    variance = _sum(centred * centred) / count
    inverse = keras.ops.rsqrt(variance + epsilon)
    out = centred * (inverse * scale) + offset
    return (out, mean, variance), (x, mean, inverse, scale)


def _backward(kept, by_out, by_mean, by_variance):
    """Gradients for `x`, `scale` and `offset`.

    Those for the moments count where they are read again in the same pass.
    """
    x, mean, inverse, scale = kept
    count = x.shape[1] * x.shape[3]
    centred, factor = x - mean, inverse * scale
    by_offset = _sum(by_out)
    by_scale = _sum(by_out * centred) * inverse
    constant = (by_mean - by_offset * factor) / count
    slope = (2.0 * by_variance - by_scale * inverse * factor) / count
    by_x = by_out * factor + (constant + centred * slope)
    return by_x, by_scale, by_offset


def _sum(x):
    return keras.ops.sum(x, axis=(1, 3), keepdims=True)


if BACKEND == "jax":

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def _in_jax(x, scale, offset, epsilon):
        return _forward(x, scale, offset, epsilon)[0]

    _in_jax.defvjp(
        _forward, lambda _, kept, gradients: _backward(kept, *gradients)
    )

elif BACKEND == "tensorflow":

    def _in_tensorflow(x, scale, offset, epsilon):
        @tf.custom_gradient
        def normalised(x, scale, offset):
            outputs, kept = _forward(x, scale, offset, epsilon)
            return outputs, functools.partial(_backward, kept)

        return normalised(x, scale, offset)

elif BACKEND == "torch":

    class _NormaliseGroups(torch.autograd.Function):
        """As `_forward` and `_backward`, in few operations."""

        @staticmethod
        def forward(context, x, scale, offset, epsilon):
            dims = (1,) if x.shape[3] == 1 else (1, 3)
            mean = x.mean(dims, keepdim=True)
            centred = x - mean
            variance = centred.square().mean(dims, keepdim=True)
            inverse = (variance + epsilon).rsqrt_()
            factor = inverse if scale is None else inverse * scale
            if offset is None:
                out = centred * factor
            else:
                out = torch.addcmul(offset, centred, factor)
            context.save_for_backward(centred, inverse, factor)
            context.dims = dims
            context.has = scale is not None, offset is not None
            context.set_materialize_grads(False)
            return out, mean, variance

        @staticmethod
        def backward(context, by_out, by_mean, by_variance):
            centred, inverse, factor = context.saved_tensors
            count = centred.shape[1] * centred.shape[3]
            if by_out is None:
                by_out = torch.zeros_like(centred)
            by_offset = by_out.sum(context.dims, keepdim=True)
            by_scale = (by_out * centred).sum(context.dims, keepdim=True)
            by_scale.mul_(inverse)
            shrunk = factor * (-1.0 / count)
            constant = by_offset * shrunk
            slope = by_scale * inverse * shrunk
            if by_mean is not None:
                constant = constant + by_mean / count
            if by_variance is not None:
                slope = slope + by_variance * (2.0 / count)
            by_x = torch.addcmul(constant, by_out, factor)
            by_x.addcmul_(centred, slope)
            has_scale, has_offset = context.has
            return (
                by_x,
                by_scale if has_scale else None,
                by_offset if has_offset else None,
                None,
            )


def normalise_some(x, weights, count_offset, scale, offset, epsilon):
    """As `normalise_groups`, by the statistics of some of the elements.

    Args:
        weights: Boolean tensor that broadcasts to `x`: which elements count.
            The others may hold NaN.
        count_offset: Float, added to the number of elements that count.
    """
    ops = keras.ops
    zero = ops.zeros((), x.dtype)
    ones = ops.broadcast_to(ops.cast(weights, x.dtype), ops.shape(x))
    count = ops.maximum(_sum(ones) + count_offset, count_offset or 1.0)
    mean = _sum(ops.where(weights, x, zero)) / count
    centred = x - mean
    squares = ops.square(ops.where(weights, centred, zero))
    variance = _sum(squares) / count
    out = rescaled(centred, variance, scale, offset, epsilon)
    return out, mean[:, 0, :, 0], variance[:, 0, :, 0]


def rescaled(centred, variance, scale, offset, epsilon):
    """Centred elements over their deviation, times `scale`, plus `offset`."""
    factor = keras.ops.rsqrt(variance + epsilon)
    if scale is not None:
        factor = factor * scale[:, None, :, None]
    out = centred * factor
    return out if offset is None else out + offset[:, None, :, None]


def gradient_of_scale(x, gradient, epsilon):
    """What a layer normalisation adds to its scale, on PyTorch.

    The deviations of the rows are weights of a sum at last, so that no
    normalised inputs are made.

    Args:
        x: Inputs, `(K, n, P)`: each of the n rows is normalised.
        gradient: For the outputs, of the same shape; both in full precision.

    Returns:
        A tensor `(K, P)`.
    """
    centred = x - x.mean(2, keepdim=True)
    variance = torch.linalg.vector_norm(centred, dim=2).square_()
    inverse = variance.mul_(1.0 / x.shape[2]).add_(epsilon).rsqrt_()
    with highest_precision():
        return (inverse[:, None] @ centred.mul_(gradient))[:, 0]
