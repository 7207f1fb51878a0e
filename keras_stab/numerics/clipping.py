"""Thresholds at which a gradient is clipped, and what they are made of."""

import keras

from keras_stab.numerics.norms import at_least

# As in the published code of each rule, against a division by zero.
SMALLEST_NORM = 1e-6


def unit_axes(shape):
    """The axes over which the norm of a unit is taken; `None` for all.

    Kernels of matrices and heads are stored `(inputs, ...)`, those of
    convolutions `(..., inputs, filters)`; what has one axis longer than 1, or
    none, is one unit.
    """
    if sum(size != 1 for size in shape) <= 1:
        return None
    return (0,) if len(shape) < 4 else tuple(range(len(shape) - 1))


def unit_factors(norms, weight_norms, clipping, epsilon):
    """What the gradient of each unit is multiplied by; 1 where not clipped.

    Args:
        norms: Vector, of the gradients of all units.
        weight_norms: Vector, of their weights.

    Returns:
        The factors and where they clip, vectors.
    """
    highest = clipping * at_least(weight_norms, epsilon)
    clipped = keras.ops.logical_not(norms < highest)
    safe = at_least(norms, SMALLEST_NORM)
    ones = keras.ops.ones_like(norms)
    return keras.ops.where(clipped, highest / safe, ones), clipped


def percentile(history, count, percent):
    """That of the first entries of a vector, between two of them linearly.

    Args:
        history: Vector.
        count: Int32 scalar tensor, how many entries there are; at least 1.
        percent: Float from 0 to 100.
    """
    ops = keras.ops
    places = ops.arange(history.shape[0], dtype="int32")
    infinity = ops.full_like(history, float("inf"))
    ordered = ops.sort(ops.where(places < count, history, infinity))
    position = ops.cast(count - 1, history.dtype) * (percent / 100.0)
    below = ops.floor(position)
    first = ops.cast(below, "int32")
    low = ops.take(ordered, first)
    high = ops.take(ordered, ops.minimum(first + 1, count - 1))
    return low + (position - below) * (high - low)


def running_moments(mean, variance, count, value):
    """Mean and variance of `count + 1` values, from those of `count`."""
    weight = 1.0 / (count + 1.0)
    moved = mean + weight * (value - mean)
    spread = count * variance + (value - mean) * (value - moved)
    return moved, weight * spread


def decayed_moments(mean, variance, decay, value):
    """Exponential averages of the value and of its squared distance."""
    moved = decay * mean + (1.0 - decay) * value
    square = keras.ops.square(value - moved)
    return moved, decay * variance + (1.0 - decay) * square


def z_threshold(mean, variance, highest, norm):
    """Whether a norm is an outlier, and the norm that it is given then.

    The further above the mean, the lower: `mean + highest^2 / z std`. For
    others it is the norm from which they would be outliers.
    """
    deviation = keras.ops.sqrt(variance)
    z = (norm - mean) / (deviation + SMALLEST_NORM)
    is_outlier = z > highest
    factor = keras.ops.where(is_outlier, z / highest, keras.ops.ones_like(z))
    return is_outlier, mean + highest * deviation / factor
