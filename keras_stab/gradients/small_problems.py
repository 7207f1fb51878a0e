"""K x K problems, run where they are cheapest."""

import functools
from typing import Any
from typing import Literal

import keras
import numpy as np

from keras_stab.backend import products
from keras_stab.numerics.aggregation import MinNorm
from keras_stab.numerics.aggregation import as_solution
from keras_stab.numerics.aggregation import solve_rule
from keras_stab.numerics.aggregation import tidied
from keras_stab.numerics.gram_measures import gram_measures
from keras_stab.numerics.min_norm import MinNormSolution
from keras_stab.numerics.min_norm import check_min_norm
from keras_stab.numerics.min_norm import solve_min_norm


def min_norm_weights(
    gram: np.ndarray | Any,
    zero_groups: Literal["exclude", "literal"] = "exclude",
    nonfinite: Literal["drop", "propagate"] = "drop",
    present: np.ndarray | Any | None = None,
) -> MinNormSolution:
    r"""Returns the convex weights whose combination has the smallest norm.

    For vectors $g_1, \dots, g_K$ with Gram matrix $G_{ij} = \langle g_i, g_j
    \rangle$ the weights solve

    $$
    \min_\lambda \lambda^\top G \lambda
    \quad \text{subject to} \quad
    \lambda \ge 0, \; \sum_k \lambda_k = 1
    $$

    so that $d = \sum_k \lambda_k g_k$ satisfies $\langle d, g_k \rangle \ge
    |d|^2$ for every $k$: a step along $-d$ increases no group's loss.

    Args:
        gram: Tensor of shape `(K, K)`, K from 1 to 64. The weights come in
            its dtype, or in float32 if that is of half precision. A NumPy
            array is solved on the host in float64 and answered in NumPy.
        zero_groups: What a group of (nearly) zero gradient does, one with
            $G_{kk} \le 10^{-14} \max_j G_{jj}$. `"exclude"`: it gets weight 0
            and leaves the problem. `"literal"`: it takes all the weight, and
            $d$ vanishes. Defaults to `"exclude"`.
        nonfinite: What a group with a NaN or infinite entry does. `"drop"`:
            it is excluded; the weights are all 0 when no group is finite.
            `"propagate"`: all weights are 1/K, so that the combination is
            not finite either and a loss scaler skips the step. Defaults to
            `"drop"`.
        present: Boolean tensor of shape `(K,)`, `False` for a group without
            rows, which takes part in nothing. Defaults to all `True`.

    Returns:
        A named tuple: `weights`, shape `(K,)`; `residual`, the certificate
        $\max_k (|d|^2 - \langle d, g_k \rangle) / (|g_k| \min_j |g_j|)$, at
        most 0 at the exact solution; `norm_squared`, $|d|^2$; `excluded`,
        boolean of shape `(K,)`.

    Raises:
        ValueError: If `gram` is not square with 1 to 64 rows, or an option
            is unknown.

    Example:

    >>> import numpy as np
    >>> solution = min_norm_weights(np.array([[9.0, 0.0], [0.0, 16.0]]))
    >>> [round(float(w), 4) for w in solution.weights]
    [0.64, 0.36]

    Departures from the paper:
        The paper's solver is not known to us. This one is a predictor-
        corrector interior point method on a scaled problem over the orthant;
        on the host block principal pivoting comes first, where the vectors
        are not nearly dependent.

    References:
        - Bui, Yao, Wang, 2026, "GRAIN: Group Aggregation via Min-Norm
          Objective", arXiv:2606.22917
        - Judice, Pires, 1994, "A block principal pivoting algorithm for
          large-scale strictly monotone linear complementarity problems",
          Computers & Operations Research 21(5)
        - Mehrotra, 1992, "On the implementation of a primal-dual interior
          point method", SIAM Journal on Optimization 2(4)
    """
    groups = check_min_norm(gram, zero_groups, nonfinite)
    if isinstance(gram, np.ndarray):
        return solve_min_norm(gram, zero_groups, nonfinite, present)
    if present is None:
        present = np.ones(groups, bool)
    present = keras.ops.convert_to_tensor(present, dtype="bool")
    return MinNormSolution(
        *products.on_small_matrix(
            _solution(zero_groups, nonfinite), gram, present
        )
    )


def min_norm_weights_and_measures(gram, present, rows, zero_groups, nonfinite):
    """The K x K part of a GRAIN step: weights and `gram_measures`."""
    rule = MinNorm(zero_groups)
    return weights_and_measures(rule, gram, present, rows, nonfinite)


def weights_and_measures(rule, gram, present, rows, nonfinite, draws=None):
    """The K x K part of a step: weights and `gram_measures`.

    Args:
        rule: A `Rule`.
        gram, present, nonfinite: As in `min_norm_weights`.
        rows: Scalar, rows in the batch.
        draws: Random numbers for a rule that wants them, see `solve_rule`.
    """
    given = () if draws is None else (draws,)
    return products.on_small_matrix(
        _weights_and_measures(rule, nonfinite), gram, present, rows, *given
    )


def weights_by_function(function, gram, present, rows, nonfinite, sizes=None):
    """The same, by a function that a user wrote.

    It runs as a part of the step, on tensors: `function(gram)`, or
    `function(gram, sizes)` where sizes are given. What takes no part is 0 in
    both.

    Args:
        sizes: Rows in each group, a list of ints or of scalar tensors.
    """
    ops = keras.ops
    gram = ops.convert_to_tensor(gram)
    present = ops.convert_to_tensor(present, dtype="bool")
    _, groups = tidied(gram, present)
    arguments = [groups.gram]
    if sizes is not None:
        sizes = ops.cast(ops.stack(sizes), groups.gram.dtype)
        arguments.append(ops.where(groups.takes_part, sizes, 0.0))
    weights = ops.convert_to_tensor(function(*arguments))
    if tuple(weights.shape) != tuple(gram.shape[:1]):
        raise ValueError(
            "`rule` must return one weight for each group. Received: weights "
            f"of shape {tuple(weights.shape)} for {gram.shape[0]} groups"
        )
    weights = ops.cast(weights, groups.gram.dtype)
    return products.on_small_matrix(
        _judged(nonfinite), gram, present, rows, weights
    )


# Cached, so that a function which runs many times is compiled once.


@functools.cache
def _solution(zero_groups, nonfinite):
    def solve(gram, present):
        return tuple(solve_min_norm(gram, zero_groups, nonfinite, present))

    return solve


@functools.cache
def _weights_and_measures(rule, nonfinite):
    def solve(gram, present, rows, draws=None):
        solution = solve_rule(rule, gram, nonfinite, present, draws)
        return solution.weights, gram_measures(
            gram, solution, present, rows, rule.is_shortest
        )

    return solve


@functools.cache
def _judged(nonfinite):
    def judge(gram, present, rows, weights):
        xp, groups = tidied(gram, present)
        # Nothing was solved, so nothing is to be certified.
        residual = xp.sum(groups.gram) * 0.0
        solution = as_solution(xp, groups, weights, residual, nonfinite)
        return solution.weights, gram_measures(
            gram, solution, present, rows, is_shortest=False
        )

    return judge
