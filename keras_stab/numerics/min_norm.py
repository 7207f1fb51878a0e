"""The min-norm point of a convex hull, from the Gram matrix of its points.

The same lines serve tensors of any backend (inside the compiled step, in full
precision) and NumPy arrays (on the host, in float64): `xp` is `keras.ops` or
`numpy`.
"""

from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_stab.numerics.interior_point import Problem
from keras_stab.numerics.interior_point import certificate
from keras_stab.numerics.interior_point import identity_like
from keras_stab.numerics.interior_point import indicator
from keras_stab.numerics.interior_point import quadratic
from keras_stab.numerics.interior_point import solve_in_graph
from keras_stab.numerics.interior_point import solve_on_host
from keras_stab.numerics.interior_point import uniform
from keras_stab.numerics.norms import common_dtype
from keras_stab.numerics.norms import in_full_precision

MAX_GROUPS = 64
_NEGLIGIBLE = 1e-14


class MinNormSolution(NamedTuple):
    """What `keras_stab.min_norm_weights` returns, and describes."""

    weights: Any
    residual: Any
    norm_squared: Any
    excluded: Any


def solve_min_norm(gram, zero_groups, nonfinite, present=None):
    """The pure computation under `keras_stab.min_norm_weights`."""
    groups = check_min_norm(gram, zero_groups, nonfinite)
    xp = np if isinstance(gram, np.ndarray) else keras.ops
    precision = common_dtype([gram])
    if xp is np:
        gram = gram.astype("float64")
        present = np.ones(groups, bool) if present is None else present
        present = np.asarray(present, bool)
    else:
        gram = in_full_precision(keras.ops.convert_to_tensor(gram))
        if present is None:
            present = keras.ops.ones((groups,), dtype="bool")
    gram = (gram + xp.transpose(gram)) / 2
    diagonal = xp.diagonal(gram)
    finite = xp.logical_and(present, xp.isfinite(diagonal))
    clean = xp.where(finite[:, None] & finite[None, :], gram, 0.0)
    diagonal = xp.diagonal(clean)
    largest = xp.max(diagonal)
    # The first condition keeps an all-zero hull out when _NEGLIGIBLE * largest
    # underflows to 0.
    included = xp.logical_and(diagonal > 0, diagonal > _NEGLIGIBLE * largest)

    root = xp.sqrt(xp.where(included, diagonal, 1.0))
    smallest = xp.min(xp.where(included, root, xp.max(root)))
    problem = _scaled(xp, clean, included, root, smallest)
    if groups == 1:
        weights = indicator(xp, included, gram)
    elif groups == 2:
        weights = _two_groups(xp, clean, included)
    elif xp is np:
        weights = solve_on_host(problem, precision)
    else:
        weights = solve_in_graph(problem)

    any_included = xp.any(included)
    residual = xp.where(any_included, certificate(xp, problem, weights), 0.0)
    curvature = quadratic(xp, problem, weights)[0]
    norm_squared = xp.where(any_included, curvature * smallest**2, 0.0)

    zero = xp.logical_and(finite, xp.logical_not(included))
    settled = xp.where(any_included, False, True)
    if zero_groups == "literal":
        settled = xp.logical_or(settled, xp.any(zero))
    weights = xp.where(settled, uniform(xp, zero, gram), weights)
    norm_squared = xp.where(settled, 0.0, norm_squared)
    residual = xp.where(settled, 0.0, residual)
    if nonfinite == "propagate":
        broken = xp.any(xp.logical_and(present, xp.logical_not(finite)))
        weights = xp.where(broken, uniform(xp, present, gram), weights)
        norm_squared = xp.where(broken, float("nan"), norm_squared)
    return MinNormSolution(
        weights, residual, norm_squared, xp.logical_not(included)
    )


def check_min_norm(gram, zero_groups, nonfinite):
    """Returns K, or raises for a bad argument."""
    shape = tuple(gram.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            "`gram` must be a square matrix of inner products, one row "
            f"per group. Received: gram of shape {shape}"
        )
    if not 1 <= shape[0] <= MAX_GROUPS:
        raise ValueError(
            f"`gram` must have 1 to {MAX_GROUPS} rows. Received: gram of "
            f"shape {shape}"
        )
    if zero_groups not in ("exclude", "literal"):
        raise ValueError(
            '`zero_groups` must be "exclude" or "literal". Received: '
            f"zero_groups={zero_groups!r}"
        )
    if nonfinite not in ("drop", "propagate"):
        raise ValueError(
            '`nonfinite` must be "drop" or "propagate". Received: '
            f"nonfinite={nonfinite!r}"
        )
    return shape[0]


def _scaled(xp, gram, included, root, smallest):
    """Takes the scales out: only angles and norm ratios in (0, 1] remain."""
    pairs = included[:, None] & included[None, :]
    # Two divisions: the product of two roots may overflow or underflow.
    correlation = xp.clip(gram / root[:, None] / root[None, :], -1.0, 1.0)
    identity = identity_like(xp, root)
    correlation = xp.where(pairs, correlation, 0.0)
    correlation = xp.where(identity > 0, 1.0, correlation)
    scale = xp.where(included, smallest / root, 0.0)
    matrix = correlation + scale[:, None] * scale[None, :]
    return Problem(correlation, scale, matrix, included)


def _two_groups(xp, gram, included):
    # Both numerators from differences: 1 - lambda_1 would lose the weight of
    # the longer vector when the norms differ by many orders of magnitude.
    first = xp.maximum(gram[1, 1] - gram[0, 1], 0.0)
    second = xp.maximum(gram[0, 0] - gram[0, 1], 0.0)
    total = first + second
    safe = xp.where(total > 0, total, 1.0)
    both = xp.stack(
        [
            xp.where(total > 0, first / safe, 0.5),
            xp.where(total > 0, second / safe, 0.5),
        ]
    )
    single = indicator(xp, included, gram)
    return xp.where(xp.all(included), both, single)
