"""An interior point method for small quadratic problems over the orthant.

It solves min y'My/2 - b'y over y >= 0, for one b or for several at once, in a
fixed number of predictor-corrector iterations. A problem has `matrix`, M, of
shape `(K, K)`; `target`, b, of shape `(..., K)`; `included`, booleans `(K,)`;
and `measure(xp, y)`, which makes the answer of a point, of the shape of b, and
its residual. `xp` is `keras.ops` or `numpy`, as in `min_norm`; products of
matrices and vectors are elementwise sums, because a matrix product may run in
TF32 or bfloat16 on an accelerator.
"""

from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_stab.numerics.norms import common_dtype

_SINGLE = {"iterations": 12, "proximal": 1e-6, "floor": 1e-10}
_DOUBLE = {"iterations": 25, "proximal": 1e-10, "floor": 1e-18}
# Where iterations on the host stop, for Gram matrices of either precision.
_RESIDUAL = {"float32": 1e-12, "float64": 1e-15}


class Problem(NamedTuple):
    """The min-norm problem with all scales taken out.

    `correlation` has a unit diagonal, `scale` is in (0, 1], `matrix` is
    correlation + scale scale'.
    """

    correlation: Any
    scale: Any
    matrix: Any
    included: Any

    @property
    def target(self):
        return self.scale

    def measure(self, xp, y):
        weights = xp.where(self.included, y, 0.0) * self.scale
        weights = weights / xp.sum(weights)
        return weights, certificate(xp, self, weights)


def indicator(xp, chosen, like):
    """1 where a boolean vector holds, else 0, in the dtype of a tensor."""
    if xp is np:
        return chosen.astype(like.dtype)
    return keras.ops.cast(chosen, like.dtype)


def uniform(xp, chosen, like):
    """Equal weights on the chosen groups, 0 on the others."""
    members = indicator(xp, chosen, like)
    return members / xp.maximum(xp.sum(members), 1.0)


def identity_like(xp, like):
    """The identity matrix of the size and dtype of vectors."""
    return xp.eye(like.shape[-1], dtype=like.dtype)


def times(xp, matrix, vectors):
    """The matrix times one vector `(K,)` or each of several `(..., K)`."""
    return xp.sum(matrix * vectors[..., None, :], axis=-1)


def quadratic(xp, problem, weights):
    """Returns y' C y and C y for the scaled point y of these weights."""
    included = problem.included
    safe_scale = xp.where(included, problem.scale, 1.0)
    y = xp.where(included, weights / safe_scale, 0.0)
    slope = times(xp, problem.correlation, y)
    return xp.sum(y * slope), slope


def certificate(xp, problem, weights):
    """`max (|d|^2 - <d, g_k>) / (|g_k| m)`: 0 at the solution, scale free."""
    curvature, slope = quadratic(xp, problem, weights)
    violation = curvature * problem.scale - slope
    return xp.max(xp.where(problem.included, violation, -float("inf")))


def solve_in_graph(problem):
    """From tensors: the same number of iterations for every problem."""
    ops = keras.ops
    double = common_dtype([problem.target]) == "float64"
    constants = _DOUBLE if double else _SINGLE
    state = ops.fori_loop(
        0,
        constants["iterations"],
        lambda _, state: _iterate(ops, problem, constants, state),
        _start(ops, problem),
    )
    return state[2]


def iterate_on_host(problem, precision="float64"):
    """From NumPy arrays: stops when the certificate is reached."""
    state = _start(np, problem)
    with np.errstate(all="ignore"):  # late iterations may divide 0 by 0
        for _ in range(_DOUBLE["iterations"]):
            state = _iterate(np, problem, _DOUBLE, state)
            if np.max(state[3]) <= _RESIDUAL[precision]:
                break
    return state[2]


def _start(xp, problem):
    ones = xp.ones_like(problem.target)
    answer = uniform(xp, problem.included, ones) * ones
    # A bound that every iterate beats, of the type of the tensors.
    residual = xp.max(ones, axis=-1) * float("inf")
    return ones, ones, answer, residual


def _iterate(xp, problem, constants, state):
    """One predictor-corrector step on min y'My/2 - b'y over y >= 0.

    `x` is y, `w` the multipliers of y >= 0. `proximal` enters the matrix of
    the linear systems only, never the residual: it biases nothing. The best
    answers so far are kept, so that more iterations never hurt. Every sum is a
    kernel of a compiled step, so they are few.
    """
    x, w, best_answer, best_residual = state
    groups = x.shape[-1]
    identity = identity_like(xp, x)
    r = times(xp, problem.matrix, x) - problem.target - w
    mu = _mean(xp, x * w)
    ratio = w / x
    system = problem.matrix + identity * (
        ratio[..., None, :] + constants["proximal"]
    )
    jacobi = 1.0 / xp.sqrt(xp.diagonal(system, axis1=-2, axis2=-1))
    inverse = _inverse(
        xp, system * jacobi[..., :, None] * jacobi[..., None, :], groups
    )

    def solve(v):
        return jacobi * times(xp, inverse, jacobi * v)

    # The first solution says how far to go towards the centre: a few digits
    # are enough. The second has one round of refinement.
    dx = solve(-r - w)
    dw = -w - ratio * dx
    step = xp.minimum(_step(xp, x, dx), _step(xp, w, dw))
    centre = _mean(xp, (x + step * dx) * (w + step * dw)) / mu
    sigma = xp.minimum(1.0, centre**3)
    correction = (sigma * mu - dx * dw) / x
    v = -r - w + correction
    dx = solve(v)
    dx = dx + solve(v - times(xp, system, dx))
    dw = -w + correction - ratio * dx
    step = 0.99 * xp.minimum(_step(xp, x, dx), _step(xp, w, dw))
    x = xp.maximum(x + step * dx, constants["floor"])
    w = xp.maximum(w + step * dw, constants["floor"])

    answer, residual = problem.measure(xp, x)
    better = xp.logical_and(xp.isfinite(residual), residual < best_residual)
    best_answer = xp.where(better[..., None], answer, best_answer)
    best_residual = xp.where(better, residual, best_residual)
    return x, w, best_answer, best_residual


def _mean(xp, values):
    return xp.mean(values, axis=-1, keepdims=True)


def _step(xp, value, change):
    """The largest steps in [0, 1] that keep `value` non-negative."""
    shrinking = change < 0
    safe = xp.where(shrinking, change, -1.0)
    steps = xp.where(shrinking, xp.minimum(-value / safe, 1.0), 1.0)
    return xp.min(steps, axis=-1, keepdims=True)


def _inverse(xp, matrix, groups):
    """Inverses of positive definite matrices with unit diagonal."""
    if xp is np:
        return np.linalg.inv(matrix)
    ops = keras.ops
    # int32 like the loop counter: with float64 as default it would be int64.
    positions = ops.arange(groups, dtype="int32")

    rank = len(matrix.shape)

    def eliminate(k, matrix):
        # Gauss-Jordan in place. Row and column k are slices, since k may be a
        # loop counter inside a compiled step.
        unit = indicator(ops, positions == k, matrix)
        sliced = [(groups, 1), (1, groups), (1, 1)]
        starts = [(0, k), (k, 0), (k, k)]
        column, row, pivot = (
            ops.slice(
                matrix,
                (0,) * (rank - 2) + start,
                (*matrix.shape[:-2], *shape),
            )
            for start, shape in zip(starts, sliced)
        )
        column, row = column - unit[:, None], row + unit[None, :]
        return matrix - column * row / pivot

    return ops.fori_loop(0, groups, eliminate, matrix)
