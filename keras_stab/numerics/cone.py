"""Shortest changes of a vector that meet bounds on its inner products.

For unit vectors u_1, ..., u_K with the inner products C, and any vector v, the
nearest vector to v whose inner product with each u_k is at least a_k is v plus
the sum of y_j u_j, for the y >= 0 that minimises y'Cy/2 - b'y with b_k = a_k -
<v, u_k>. Several such problems are solved at once.
"""

from typing import Any
from typing import NamedTuple

import numpy as np

from keras_stab.numerics.interior_point import iterate_on_host
from keras_stab.numerics.interior_point import solve_in_graph
from keras_stab.numerics.interior_point import times
from keras_stab.numerics.pivoting import pivot_together


class Changes(NamedTuple):
    """Several problems.

    `matrix` is C, `(K, K)`, with a unit diagonal; `target` the b, `(N, K)`;
    `included` says which vectors there are.
    """

    matrix: Any
    target: Any
    included: Any

    def measure(self, xp, y):
        """The point and how far it is from the conditions of a minimum.

        These are that no bound is missed, and that no y is positive where one
        is more than met: then the change would be longer than it has to be.
        """
        y = xp.where(self.included, y, 0.0)
        if xp is np:
            excess = y @ self.matrix - self.target
        else:
            excess = times(xp, self.matrix, y) - self.target
        missed = xp.max(xp.where(self.included, -excess, 0.0), axis=-1)
        needless = xp.abs(xp.sum(y * excess, axis=-1))
        needless = needless / xp.maximum(xp.sum(y, axis=-1), 1.0)
        return y, xp.maximum(missed, needless)


def solve_changes(xp, problem, precision="float64"):
    """The `y` of all problems, `(N, K)`, and their residuals, `(N,)`.

    Where vectors are (nearly) dependent, y is one of many; the change that it
    stands for is the same.
    """
    if xp is not np:
        y = solve_in_graph(problem)
    else:
        y = pivot_together(problem.matrix, problem.target, precision)
        if y is None:
            y = iterate_on_host(problem, precision)
    return problem.measure(xp, y)
