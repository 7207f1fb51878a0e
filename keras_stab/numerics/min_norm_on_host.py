"""The min-norm point of a convex hull from a NumPy array, in float64."""

import numpy as np

from keras_stab.numerics.interior_point import Problem
from keras_stab.numerics.interior_point import uniform
from keras_stab.numerics.norms import common_dtype
from keras_stab.numerics.pivoting import certificate_on_host
from keras_stab.numerics.pivoting import solve_on_host


def min_norm_on_host(gram, negligible, zero_groups, nonfinite, present):
    """Weights, residual, squared norm and excluded groups.

    Args:
        gram: Array of shape `(K, K)`.
        negligible: A group whose squared norm is at most this share of the
            largest is one of zero gradient.
        zero_groups, nonfinite, present: As in `min_norm_weights`.
    """
    precision = common_dtype([gram])
    gram = gram.astype("float64")
    gram = (gram + gram.T) / 2
    squares = gram.diagonal()
    if present is None:
        present = np.ones(len(gram), bool)
    present = np.asarray(present, bool)
    finite = np.isfinite(squares) & present
    if not finite.all():
        squares = np.where(finite, squares, 0.0)
    included = squares > negligible * max(squares.max(), 0.0)
    excluded = ~included
    if included.all():  # the usual case
        return *_min_norm_point(gram, precision), excluded

    weights, residual, norm_squared = np.zeros(len(gram)), 0.0, 0.0
    chosen = included.nonzero()[0]
    zero = finite & excluded
    if not len(chosen) or (zero_groups == "literal" and zero.any()):
        weights = uniform(np, zero, gram)
    else:
        weights[chosen], residual, norm_squared = _min_norm_point(
            gram[chosen[:, None], chosen], precision
        )
    if nonfinite == "propagate" and (present & ~finite).any():
        weights, norm_squared = uniform(np, present, gram), float("nan")
    return weights, residual, norm_squared, excluded


def _min_norm_point(gram, precision):
    """Weights, residual and squared norm for groups that all take part."""
    root = np.sqrt(gram.diagonal())
    smallest = root.min()
    # Only angles and norm ratios in (0, 1] remain. Two divisions: the product
    # of two roots may overflow or underflow.
    correlation = gram / root[:, None] / root
    np.minimum(correlation, 1.0, out=correlation)
    np.maximum(correlation, -1.0, out=correlation)
    correlation.flat[:: len(root) + 1] = 1.0
    scale = smallest / root
    matrix = correlation + scale[:, None] * scale
    everyone = np.ones(len(root), bool)
    problem = Problem(correlation, scale, matrix, everyone)
    if len(root) == 1:
        weights = np.ones(1)
    elif len(root) == 2:
        weights = _two_groups(gram)
    else:
        weights = solve_on_host(problem, precision)
    residual, curvature = certificate_on_host(problem, weights)
    return weights, residual, curvature * smallest**2


def _two_groups(gram):
    # Both from differences: 1 - lambda_1 would lose the weight of the longer
    # vector when the norms differ by many orders of magnitude.
    opposite = np.maximum(gram.diagonal()[::-1] - gram[0, 1], 0.0)
    total = opposite.sum()
    return opposite / total if total > 0 else np.full(2, 0.5)
