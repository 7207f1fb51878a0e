"""The min-norm point of a convex hull, from the Gram matrix of its points.

The same lines serve tensors of any backend (float32, inside the compiled
step) and NumPy arrays (float64, on the host): `xp` is `keras.ops` or `numpy`.
Products of matrices and vectors are written as elementwise sums, because a
matrix product may run in TF32 or bfloat16 on an accelerator.
"""

import collections

import keras
import numpy as np

MAX_GROUPS = 32
_NEGLIGIBLE = 1e-14
_TENSOR = {"iterations": 12, "proximal": 1e-6, "floor": 1e-10}
_HOST = {"iterations": 25, "proximal": 1e-10, "floor": 1e-18}
_HOST_RESIDUAL = 1e-12

MinNormSolution = collections.namedtuple(
    "MinNormSolution", ["weights", "residual", "norm_squared", "excluded"]
)

# A problem with all scales taken out: `correlation` has a unit diagonal,
# `scale` is in (0, 1], `matrix` is correlation + scale scale'.
_Problem = collections.namedtuple(
    "_Problem", ["correlation", "scale", "matrix", "included"]
)


def solve_min_norm(gram, zero_groups, nonfinite, present=None):
    """The pure computation under `keras_stab.min_norm_weights`."""
    groups = check_min_norm(gram, zero_groups, nonfinite)
    xp = np if isinstance(gram, np.ndarray) else keras.ops
    if xp is np:
        gram = gram.astype("float64")
        present = np.ones(groups, bool) if present is None else present
        present = np.asarray(present, bool)
    else:
        gram = keras.ops.cast(gram, "float32")
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
        weights = xp.where(included, 1.0, 0.0)
    elif groups == 2:
        weights = _two_groups(xp, clean, included)
    elif xp is np:
        weights = _solve_on_host(problem)
    else:
        weights = _solve_in_graph(problem)

    any_included = xp.any(included)
    residual = xp.where(any_included, _residual(xp, problem, weights), 0.0)
    curvature = _quadratic(xp, problem, weights)[0]
    norm_squared = xp.where(any_included, curvature * smallest**2, 0.0)

    zero = xp.logical_and(finite, xp.logical_not(included))
    settled = xp.where(any_included, False, True)
    if zero_groups == "literal":
        settled = xp.logical_or(settled, xp.any(zero))
    weights = xp.where(settled, _uniform(xp, zero), weights)
    norm_squared = xp.where(settled, 0.0, norm_squared)
    residual = xp.where(settled, 0.0, residual)
    if nonfinite == "propagate":
        broken = xp.any(xp.logical_and(present, xp.logical_not(finite)))
        weights = xp.where(broken, _uniform(xp, present), weights)
        norm_squared = xp.where(broken, float("nan"), norm_squared)
    return MinNormSolution(
        weights, residual, norm_squared, xp.logical_not(included)
    )


def check_min_norm(gram, zero_groups, nonfinite):
    """Returns K, or raises for a bad argument."""
    shape = tuple(gram.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            "`gram` must be a square matrix of inner products, one row a "
            f"group. Received: gram of shape {shape}"
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


def _uniform(xp, chosen):
    count = xp.sum(xp.where(chosen, 1.0, 0.0))
    return xp.where(chosen, 1.0, 0.0) / xp.maximum(count, 1.0)


def _scaled(xp, gram, included, root, smallest):
    """Takes the scales out: only angles and norm ratios in (0, 1] remain."""
    pairs = included[:, None] & included[None, :]
    # Two divisions: the product of two roots may overflow or underflow.
    correlation = xp.clip(gram / root[:, None] / root[None, :], -1.0, 1.0)
    identity = _identity(xp, root)
    correlation = xp.where(pairs, correlation, 0.0)
    correlation = xp.where(identity > 0, 1.0, correlation)
    scale = xp.where(included, smallest / root, 0.0)
    matrix = correlation + scale[:, None] * scale[None, :]
    return _Problem(correlation, scale, matrix, included)


def _identity(xp, like):
    groups = like.shape[0]
    if xp is np:
        return np.eye(groups)
    return keras.ops.eye(groups, dtype="float32")


def _product(xp, matrix, vector):
    return xp.sum(matrix * vector[None, :], axis=1)


def _quadratic(xp, problem, weights):
    """Returns y' C y and C y for the scaled point y of these weights."""
    included = problem.included
    safe_scale = xp.where(included, problem.scale, 1.0)
    y = xp.where(included, weights / safe_scale, 0.0)
    slope = _product(xp, problem.correlation, y)
    return xp.sum(y * slope), slope


def _residual(xp, problem, weights):
    curvature, slope = _quadratic(xp, problem, weights)
    violation = curvature * problem.scale - slope
    return xp.max(xp.where(problem.included, violation, -float("inf")))


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
    single = xp.where(included, 1.0, 0.0)
    return xp.where(xp.all(included), both, single)


def _solve_in_graph(problem):
    ops = keras.ops
    state = _start(ops, problem)
    state = ops.fori_loop(
        0,
        _TENSOR["iterations"],
        lambda _, state: _iterate(ops, problem, _TENSOR, state),
        state,
    )
    return state[2]


def _solve_on_host(problem):
    weights = _all_active(problem)
    if weights is not None:
        return weights
    state = _start(np, problem)
    with np.errstate(all="ignore"):  # late iterations may divide 0 by 0
        for _ in range(_HOST["iterations"]):
            state = _iterate(np, problem, _HOST, state)
            if state[3] <= _HOST_RESIDUAL:
                break
    return state[2]


def _all_active(problem):
    """The usual case on the host: every group has a positive weight."""
    try:
        y = np.linalg.solve(problem.matrix, problem.scale)
    except np.linalg.LinAlgError:
        return None
    total = np.sum(y * problem.scale)
    if not np.all(y >= 0) or not total > 0:
        return None
    weights = y * problem.scale / total
    if _residual(np, problem, weights) > 1e-10:
        return None
    return weights


def _start(xp, problem):
    ones = xp.ones_like(problem.scale)
    weights = _uniform(xp, problem.included)
    # A bound that every iterate beats, of the type of the tensors.
    residual = xp.max(ones) * float("inf")
    return ones, ones, weights, residual


def _iterate(xp, problem, constants, state):
    """One predictor-corrector step on min y'My/2 - b'y over y >= 0.

    `x` is y, `w` the multipliers of y >= 0. `proximal` enters the matrix of
    the linear systems only, never the residual: it biases nothing. The best
    weights so far are kept, so that more iterations never hurt.
    """
    x, w, best_weights, best_residual = state
    b = problem.scale
    groups = x.shape[0]
    identity = _identity(xp, x)
    r = _product(xp, problem.matrix, x) - b - w
    mu = xp.mean(x * w)
    ratio = w / x
    system = problem.matrix + identity * (ratio + constants["proximal"])
    jacobi = 1.0 / xp.sqrt(xp.diagonal(system))
    inverse = _inverse(xp, system * jacobi[:, None] * jacobi[None, :], groups)

    def solve(v):
        z = jacobi * _product(xp, inverse, jacobi * v)
        rest = v - _product(xp, system, z)  # one round of refinement
        return z + jacobi * _product(xp, inverse, jacobi * rest)

    dx = solve(-r - w)
    dw = -w - ratio * dx
    step = xp.minimum(_step(xp, x, dx), _step(xp, w, dw))
    centre = xp.mean((x + step * dx) * (w + step * dw)) / mu
    sigma = xp.minimum(1.0, centre**3)
    correction = (sigma * mu - dx * dw) / x
    dx = solve(-r - w + correction)
    dw = -w + correction - ratio * dx
    step = 0.99 * xp.minimum(_step(xp, x, dx), _step(xp, w, dw))
    x = xp.maximum(x + step * dx, constants["floor"])
    w = xp.maximum(w + step * dw, constants["floor"])

    weights = xp.where(problem.included, x, 0.0) * b
    weights = weights / xp.sum(weights)
    residual = _residual(xp, problem, weights)
    better = xp.logical_and(xp.isfinite(residual), residual < best_residual)
    best_weights = xp.where(better, weights, best_weights)
    best_residual = xp.where(better, residual, best_residual)
    return x, w, best_weights, best_residual


def _step(xp, value, change):
    """The largest step in [0, 1] that keeps `value` non-negative."""
    shrinking = change < 0
    safe = xp.where(shrinking, change, -1.0)
    return xp.min(xp.where(shrinking, xp.minimum(-value / safe, 1.0), 1.0))


def _inverse(xp, matrix, groups):
    """Inverse of a positive definite matrix with unit diagonal."""
    if xp is np:
        return np.linalg.inv(matrix)
    ops = keras.ops
    positions = ops.arange(groups)

    def eliminate(k, matrix):
        # Gauss-Jordan in place; a one-hot vector selects row and column k so
        # that k may be a loop counter inside a compiled step.
        unit = ops.where(positions == k, 1.0, 0.0)
        column = ops.sum(matrix * unit[None, :], axis=1)
        row = ops.sum(matrix * unit[:, None], axis=0)
        pivot = ops.sum(column * unit)
        return matrix - (column - unit)[:, None] * (row + unit) / pivot

    return ops.fori_loop(0, groups, eliminate, matrix)
