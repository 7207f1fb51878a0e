"""Block principal pivoting for small quadratic problems, on the host.

It finds which groups have a positive weight, and their weights as the solution
of one linear system: a few systems instead of a dozen iterations with an
inverse in each. It knows nothing of earlier problems, so that a step depends
on nothing that is not saved.
"""

import numpy as np

from keras_stab.numerics.interior_point import iterate_on_host

# Below this distance from what the groups before it span, in units of its own
# length, rounding has its say in what a group adds: many weights are then as
# good as each other. For Gram matrices of either precision.
_DEPENDENT = {"float32": 1e-3, "float64": 1e-5}
# How often in a row the number of wrong groups may fail to fall before they
# change sides one at a time, and how many turns there are, besides one a group.
_CHANCES = 3
_TURNS = 20
# A negative weight, or a gain from another group, that is more than rounding,
# for weights (before scales are put back) of at most 1.
_WRONG = 1e-13
_RESIDUAL = 1e-10


def solve_on_host(problem, precision="float64"):
    """Weights from NumPy arrays, for groups that all take part.

    Where groups are (nearly) dependent the weights are not unique. The
    interior point method then shares them among such groups, where pivoting
    would leave the choice to rounding.
    """
    weights = solve_by_pivoting(problem, precision)
    return iterate_on_host(problem, precision) if weights is None else weights


def solve_by_pivoting(problem, precision="float64"):
    """Weights by block principal pivoting; `None` where that is not safe.

    It begins with a positive weight for every group, the usual case. All
    groups on the wrong side change it at once; should that go round, the last
    one alone, which comes to an end.

    References:
        - Judice, Pires, 1994, "A block principal pivoting algorithm for
          large-scale strictly monotone linear complementarity problems",
          Computers & Operations Research 21(5)
    """
    matrix, b = problem.matrix, problem.scale
    groups = len(b)
    try:
        pivots = np.linalg.cholesky(matrix).diagonal()
        # Not `<`, which is false for NaN too.
        if not pivots.min() > _DEPENDENT[precision]:
            return None
        y = np.linalg.solve(matrix, b)
        wrong = y < -_WRONG * max(1.0, y.max())
        positive = np.ones(groups, bool)
        fewest, chances = groups + 1, _CHANCES
        for _ in range(_TURNS + groups):
            count = np.count_nonzero(wrong)
            if not count:
                break
            if count < fewest:
                fewest, chances = count, _CHANCES
            elif chances:
                chances -= 1
            else:
                wrong = np.arange(groups) == wrong.nonzero()[0][-1]
            positive ^= wrong
            chosen = positive.nonzero()[0]
            y = np.zeros(groups)
            y[chosen] = np.linalg.solve(
                matrix[chosen[:, None], chosen], b[chosen]
            )
            # Of the others: what their weight would gain.
            gain = np.where(positive, y, matrix @ y - b)
            wrong = gain < -_WRONG * max(1.0, y.max())
        else:
            return None
    except np.linalg.LinAlgError:
        return None
    weights = np.maximum(y, 0.0) * b
    weights /= weights.sum()
    if not certificate_on_host(problem, weights)[0] <= _RESIDUAL:
        return None
    return weights


def pivot_together(matrix, targets, precision="float64"):
    """Minima of y'My/2 - b'y over y >= 0 for several b, in one go.

    As `solve_by_pivoting`, and `None` where that would be; but it begins with
    the weights that are positive to first order.

    Args:
        matrix: Array `(K, K)`, M, with a unit diagonal.
        targets: Array `(N, K)`, the b.
        precision: Of the numbers that the matrix was made from.
    """
    positive = targets > 0.0
    if not positive.any():
        return np.zeros_like(targets)
    count, groups = targets.shape
    fewest, chances = np.full(count, groups + 1), np.zeros(count, int)
    try:
        pivots = np.linalg.cholesky(matrix).diagonal()
        if not pivots.min() > _DEPENDENT[precision]:
            return None
        for turn in range(_TURNS + groups):
            # Those of weight 0 have a row and a column of the identity.
            chosen = positive.astype(matrix.dtype)
            system = matrix * chosen[:, :, None] * chosen[:, None, :]
            system.reshape(count, -1)[:, :: groups + 1] = 1.0
            right = (targets * chosen)[:, :, None]
            y = np.linalg.solve(system, right)[:, :, 0]
            gain = np.where(positive, y, y @ matrix - targets)
            wrong = gain < -_WRONG * max(1.0, y.max())
            if not wrong.any():
                return np.maximum(y, 0.0)
            if turn >= _CHANCES:
                numbers = wrong.sum(axis=1)
                chances = np.where(numbers < fewest, _CHANCES, chances - 1)
                fewest = np.minimum(numbers, fewest)
                last = np.cumsum(wrong[:, ::-1], axis=1)[:, ::-1] == 1
                wrong &= last | (chances > 0)[:, None]
            positive ^= wrong
    except np.linalg.LinAlgError:
        pass
    return None


def certificate_on_host(problem, weights):
    """As `certificate` for groups that all take part; and y' C y."""
    y = weights / problem.scale
    slope = problem.correlation @ y
    curvature = y @ slope
    return (curvature * problem.scale - slope).max(), curvature
