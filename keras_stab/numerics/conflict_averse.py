"""CAGrad: the best worst group within a ball around the mean.

For the mean m of gradients g_k, d maximises min_k <d, g_k> over |d - m| <= c
|m|. For a bound a, the nearest vector to m with <d, g_k> >= a for all k is one
problem of `cone`; its distance from m grows with a, and d is the one on the
ball. Where no bound above 0 can be met, it is the nearest one that meets 0.
"""

import keras
import numpy as np

from keras_stab.numerics.cone import Changes
from keras_stab.numerics.cone import solve_changes
from keras_stab.numerics.interior_point import times

# Bounds that are tried at once, and how often the interval between the last one
# that lies in the ball and the next is divided again. In between, the change is
# a straight line, or nearly so.
_BOUNDS = 16
_ROUNDS = 3
# A residual that says that a bound can be met.
_MET = 1e-4
# Below this share of their lengths gradients cancel: their mean is rounding.
_CANCELLED = 1e-6


def change_in_ball(xp, groups, mean, c):
    """What is added to the weights of the mean, `(K,)`, and the residual.

    Args:
        groups: A `Groups`.
        mean: The weights of the mean, `(K,)`.
        c: The radius of the ball, as a share of the norm of the mean.
    """
    counted, cosines = groups.counted, groups.correlation
    lengths = xp.where(counted, mean * groups.norms, 0.0)
    largest = xp.max(lengths)
    unit = lengths / xp.where(largest > 0, largest, 1.0)
    with_each = times(xp, cosines, unit)
    norm = xp.sqrt(xp.maximum(xp.sum(unit * with_each), 0.0))
    exists = norm > _CANCELLED * xp.sum(unit)
    norm = xp.where(exists, norm, 1.0)
    # From here on |m| = |g_k| = 1, and bounds are for the shortest gradient.
    slopes = xp.where(counted, with_each / norm, 0.0)
    shortest = xp.min(xp.where(counted, groups.norms, xp.max(groups.norms)))
    scale = xp.where(counted, shortest / groups.norms, 1.0)
    far = xp.max(xp.abs(slopes) / scale) + 2.0
    low = xp.min(xp.where(counted, slopes / scale, far))
    high = xp.min(xp.where(counted, (slopes + c) / scale, far))

    def problem(bounds):
        targets = bounds[:, None] * scale[None, :] - slopes[None, :]
        return Changes(cosines, xp.where(counted, targets, 0.0), counted)

    steps = np.linspace(0.0, 1.0, _BOUNDS)
    if xp is not np:
        steps = keras.ops.cast(steps, cosines.dtype)
    zero = xp.reshape(xp.minimum(xp.maximum(0.0 * low, low), high), (1,))
    at_low = 0.0 * slopes  # which the mean meets
    for i in range(_ROUNDS):
        bounds = low + (high - low) * steps
        if i == 0:  # the last that can be met where the gradients cancel
            bounds = xp.concatenate([bounds, zero], axis=0)
        y, residuals = solve_changes(xp, problem(bounds), groups.precision)
        squares = _square(xp, cosines, y)
        met = residuals <= _MET
        inside = xp.logical_and(met, squares <= c * c)
        beyond = xp.logical_and(xp.logical_not(inside), bounds > low)
        high = xp.min(xp.where(beyond, bounds, xp.max(bounds)))
        # None where what was found for the lowest bound is not as good now.
        below = xp.logical_and(inside, bounds <= high)
        found = xp.any(below)
        low = xp.max(xp.where(below, bounds, low))
        at_low = xp.where(found, _row(xp, y, bounds == low), at_low)
        at_high = _row(xp, y, bounds == high)
        reached = xp.any(xp.logical_and(bounds == high, met))

    # Where the line from one to the other leaves the ball.
    step = at_high - at_low
    a, b = _square(xp, cosines, step), xp.sum(step * times(xp, cosines, at_low))
    rest = xp.maximum(c * c - _square(xp, cosines, at_low), 0.0)
    root = b + xp.sqrt(xp.maximum(b * b + a * rest, 0.0))
    part = xp.minimum(rest / xp.where(root > 0, root, 1.0), 1.0)
    part = xp.where(xp.logical_and(reached, root > 0), part, 0.0)
    bound = xp.reshape(low + part * (high - low), (1,))
    y, residuals = problem(bound).measure(xp, (at_low + part * step)[None, :])
    length = xp.sqrt(_square(xp, cosines, y[0]))
    residual = xp.maximum(residuals[0], xp.maximum(length - c, 0.0))
    weights = xp.where(counted, y[0] * norm * largest / groups.norms, 0.0)
    # Without a mean there is no ball.
    return xp.where(exists, weights, 0.0), xp.where(exists, residual, 0.0)


def _square(xp, matrix, y):
    return xp.maximum(xp.sum(y * times(xp, matrix, y), axis=-1), 0.0)


def _row(xp, values, chosen):
    """One of the rows of a matrix that are chosen, all of them alike."""
    chosen = chosen[:, None]
    one = xp.max(xp.where(chosen, values, -float("inf")), axis=0)
    return xp.where(xp.isfinite(one), one, 0.0)
