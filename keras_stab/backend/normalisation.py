"""Normalisation of several groups at once, each by its own statistics."""

import keras


def normalise_groups(x, scale, offset, epsilon):
    """Each group and channel with mean 0 and variance 1, then scaled.

    Args:
        x: Tensor `(K, n, C, p)`: the channels of group k have `n p` elements.
        scale, offset: Tensors `(K, C)`, or `None`.
        epsilon: Float, added to the variance.

    Returns:
        A tensor of the shape of `x`; means and biased variances, `(K, C)`.
    """
    ops = keras.ops
    mean = ops.mean(x, axis=(1, 3), keepdims=True)
    centred = x - mean
    variance = ops.mean(ops.square(centred), axis=(1, 3), keepdims=True)
    out = rescaled(centred, variance, scale, offset, epsilon)
    return out, mean[:, 0, :, 0], variance[:, 0, :, 0]


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
    count = ops.sum(ones, axis=(1, 3), keepdims=True)
    count = ops.maximum(count + count_offset, count_offset or 1.0)
    kept = ops.where(weights, x, zero)
    mean = ops.sum(kept, axis=(1, 3), keepdims=True) / count
    centred = x - mean
    squares = ops.square(ops.where(weights, centred, zero))
    variance = ops.sum(squares, axis=(1, 3), keepdims=True) / count
    out = rescaled(centred, variance, scale, offset, epsilon)
    return out, mean[:, 0, :, 0], variance[:, 0, :, 0]


def rescaled(centred, variance, scale, offset, epsilon):
    """Centred elements over their deviation, times `scale`, plus `offset`."""
    factor = keras.ops.rsqrt(variance + epsilon)
    if scale is not None:
        factor = factor * scale[:, None, :, None]
    out = centred * factor
    return out if offset is None else out + offset[:, None, :, None]
