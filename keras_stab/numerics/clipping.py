"""Thresholds at which a gradient is clipped, and what they are made of.

`ops` is `keras.ops`, or NumPy for arrays.
"""

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


def unit_factors(ops, norms, weight_norms, clipping, epsilon):
    """What the gradient of each unit is multiplied by; 1 where not clipped.

    Args:
        norms: Vector, of the gradients of all units.
        weight_norms: Vector, of their weights.

    Returns:
        Two vectors: the factors, and 1 where they clip, else 0.
    """
    highest = clipping * ops.where(
        weight_norms < epsilon, epsilon, weight_norms
    )
    ones = ops.ones_like(norms)
    clips = ops.where(norms < highest, 0.0 * ones, ones)
    safe = ops.where(norms < SMALLEST_NORM, SMALLEST_NORM, norms)
    return ops.where(clips > 0, highest / safe, ones), clips


def percentile(ops, history, count, percent):
    """That of the first entries of a vector, between two of them linearly.

    Args:
        history: Vector.
        count: How many entries there are, a scalar of its dtype, at least 1.
        percent: Float from 0 to 100.
    """
    places = ops.arange(history.shape[0], dtype=history.dtype)
    ordered = ops.sort(ops.where(places < count, history, float("inf")))
    position = (count - 1.0) * (percent / 100.0)
    below = ops.floor(position)
    above = ops.where(below < count - 1.0, below + 1.0, below)
    low, high = (
        ops.sum(ops.where(places == place, ordered, 0.0))
        for place in (below, above)
    )
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
    square = (value - moved) * (value - moved)
    return moved, decay * variance + (1.0 - decay) * square


def z_threshold(ops, mean, variance, highest, norm):
    """Whether a norm is an outlier, and the norm that it is given then.

    The further above the mean, the lower: `mean + highest^2 / z std`. For
    others it is the norm from which they would be outliers.
    """
    deviation = ops.sqrt(variance)
    z = (norm - mean) / (deviation + SMALLEST_NORM)
    is_outlier = z > highest
    factor = ops.where(is_outlier, z / highest, ops.ones_like(z))
    return is_outlier, mean + highest * deviation / factor
