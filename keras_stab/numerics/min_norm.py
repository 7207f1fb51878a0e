"""The min-norm point of a convex hull, from the Gram matrix of its points.

Tensors of any backend are solved by the lines here, inside the compiled step
and in full precision; NumPy arrays on the host, in float64.
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
from keras_stab.numerics.interior_point import uniform
from keras_stab.numerics.min_norm_on_host import min_norm_on_host
from keras_stab.numerics.norms import in_full_precision

MAX_GROUPS = 64
NEGLIGIBLE = 1e-14


class MinNormSolution(NamedTuple):
    """What `keras_stab.min_norm_weights` returns, and describes."""

    weights: Any
    residual: Any
    norm_squared: Any
    excluded: Any


def solve_min_norm(gram, zero_groups, nonfinite, present=None):
    """The pure computation under `keras_stab.min_norm_weights`."""
    groups = check_min_norm(gram, zero_groups, nonfinite)
    if isinstance(gram, np.ndarray):
        return MinNormSolution(
            *min_norm_on_host(gram, NEGLIGIBLE, zero_groups, nonfinite, present)
        )
    ops = keras.ops
    gram = in_full_precision(ops.convert_to_tensor(gram))
    if present is None:
        present = ops.ones((groups,), dtype="bool")
    gram = (gram + ops.transpose(gram)) / 2
    # Not `ops.diagonal`, which a compiler takes for a lookup.
    identity = identity_like(ops, gram)
    diagonal = ops.sum(ops.where(identity > 0, gram, 0.0), axis=1)
    finite = ops.logical_and(present, ops.isfinite(diagonal))
    clean = ops.where(finite[:, None] & finite[None, :], gram, 0.0)
    diagonal = ops.where(finite, diagonal, 0.0)
    largest = ops.max(diagonal)
    any_included = largest > 0
    # The first condition keeps an all-zero hull out when NEGLIGIBLE * largest
    # underflows to 0.
    included = ops.logical_and(diagonal > 0, diagonal > NEGLIGIBLE * largest)

    root = ops.sqrt(ops.where(included, diagonal, 1.0))
    longest = ops.where(any_included, ops.sqrt(largest), 1.0)
    smallest = ops.min(ops.where(included, root, longest))
    problem = _scaled(clean, included, root, smallest)
    if groups == 1:
        weights = indicator(ops, included, gram)
    elif groups == 2:
        weights = _two_groups(clean, included)
    else:
        weights = solve_in_graph(problem)

    residual = ops.where(any_included, certificate(ops, problem, weights), 0.0)
    curvature = quadratic(ops, problem, weights)[0]
    norm_squared = ops.where(any_included, curvature * smallest**2, 0.0)

    zero = ops.logical_and(finite, ops.logical_not(included))
    settled = ops.where(any_included, False, True)
    if zero_groups == "literal":
        settled = ops.logical_or(settled, ops.any(zero))
    weights = ops.where(settled, uniform(ops, zero, gram), weights)
    norm_squared = ops.where(settled, 0.0, norm_squared)
    residual = ops.where(settled, 0.0, residual)
    if nonfinite == "propagate":
        broken = ops.any(ops.logical_and(present, ops.logical_not(finite)))
        weights = ops.where(broken, uniform(ops, present, gram), weights)
        norm_squared = ops.where(broken, float("nan"), norm_squared)
    return MinNormSolution(
        weights, residual, norm_squared, ops.logical_not(included)
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


def _scaled(gram, included, root, smallest):
    """Takes the scales out: only angles and norm ratios in (0, 1] remain."""
    ops = keras.ops
    pairs = included[:, None] & included[None, :]
    # Two divisions: the product of two roots may overflow or underflow.
    correlation = ops.clip(gram / root[:, None] / root[None, :], -1.0, 1.0)
    identity = identity_like(ops, root)
    correlation = ops.where(pairs, correlation, 0.0)
    correlation = ops.where(identity > 0, 1.0, correlation)
    scale = ops.where(included, smallest / root, 0.0)
    matrix = correlation + scale[:, None] * scale[None, :]
    return Problem(correlation, scale, matrix, included)


def _two_groups(gram, included):
    ops = keras.ops
    # Both numerators from differences: 1 - lambda_1 would lose the weight of
    # the longer vector when the norms differ by many orders of magnitude.
    first = ops.maximum(gram[1, 1] - gram[0, 1], 0.0)
    second = ops.maximum(gram[0, 0] - gram[0, 1], 0.0)
    total = first + second
    safe = ops.where(total > 0, total, 1.0)
    both = ops.stack(
        [
            ops.where(total > 0, first / safe, 0.5),
            ops.where(total > 0, second / safe, 0.5),
        ]
    )
    single = indicator(ops, included, gram)
    return ops.where(ops.all(included), both, single)
