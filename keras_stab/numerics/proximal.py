"""Projections and proximal operators of tensors, exact.

Each is `argmin_z f(z) + |z - v|^2 / (2 step)`, with `threshold` for the step
times the weight of f, and a projection when f is the indicator of a set.
`axis` names the axes whose entries make one group (0: the columns of a
matrix); `None` makes one group of all entries.
"""

import keras

ops = keras.ops


def box(value, lower, upper):
    """Entries between two bounds; `None` for a side without one."""
    if lower is not None:
        value = ops.where(value < lower, _number(lower, value), value)
    if upper is not None:
        value = ops.where(value > upper, _number(upper, value), value)
    return value


def l2_ball(value, radius, axis=None):
    """Groups of Euclidean norm at most `radius`."""
    norm = _norm(value, axis)
    outside = norm > radius
    safe = ops.where(outside, norm, ops.ones_like(norm))
    return ops.where(outside, value * (radius / safe), value)


def simplex(value, total, axis=-1):
    """Nonnegative groups whose sum is `total`.

    The threshold is the largest of (u_1 + .. + u_j - total) / j over the
    entries u in decreasing order: it grows with j while u_j is above it.
    """
    flat = value if axis is not None else ops.reshape(value, (-1,))
    along = -1 if axis is None else axis
    sums = _cumulative_sums(-ops.sort(-flat, axis=along), along)
    shape = [1] * len(flat.shape)
    shape[along] = -1
    counts = ops.arange(1, flat.shape[along] + 1)
    counts = ops.reshape(ops.cast(counts, flat.dtype), shape)
    threshold = ops.max((sums - total) / counts, axis=along, keepdims=True)
    shrunk = flat - threshold
    shrunk = ops.where(shrunk > 0, shrunk, ops.zeros_like(shrunk))
    return ops.reshape(shrunk, value.shape)


def l1_ball(value, radius, axis=None):
    """Groups whose absolute values sum to at most `radius`."""
    absolute = ops.abs(value)
    keepdims = axis is not None
    total = ops.sum(absolute, axis=axis, keepdims=keepdims)
    projected = ops.sign(value) * simplex(absolute, radius, axis)
    return ops.where(total > radius, projected, value)


def spectral_ball(matrix, radius):
    """Matrices whose singular values are at most `radius`."""
    return _with_singular_values(
        matrix, lambda s: ops.where(s > radius, _number(radius, s), s)
    )


def soft_threshold(value, threshold):
    """The proximal operator of the sum of absolute values."""
    zero = ops.zeros_like(value)
    above = ops.where(value > threshold, value - threshold, zero)
    return ops.where(value < -threshold, value + threshold, above)


def group_threshold(value, threshold, axis=None):
    """The proximal operator of the sum of the Euclidean norms of groups."""
    norm = _norm(value, axis)
    kept = norm > threshold
    safe = ops.where(kept, norm, ops.ones_like(norm))
    return ops.where(
        kept, value * (1.0 - threshold / safe), ops.zeros_like(value)
    )


def singular_value_threshold(matrix, threshold):
    """The proximal operator of the sum of singular values."""
    return _with_singular_values(matrix, lambda s: soft_threshold(s, threshold))


def _norm(value, axis):
    squares = ops.square(value)
    return ops.sqrt(ops.sum(squares, axis=axis, keepdims=axis is not None))


def _with_singular_values(matrix, change):
    left, values, right = ops.svd(matrix, full_matrices=False)
    return (left * change(values)[..., None, :]) @ right


def _number(number, like):
    """A scalar tensor; `keras.ops.cast` would go through float32."""
    return ops.convert_to_tensor(number, like.dtype)


def _cumulative_sums(value, axis):
    """On PyTorch `keras.ops.cumsum` rounds double precision to float32."""
    if hasattr(value, "cumsum"):
        return value.cumsum(axis)
    return ops.cumsum(value, axis=axis)
