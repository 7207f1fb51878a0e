"""Rules that make weights of K groups from their Gram matrix.

As in `min_norm`: tensors of any backend inside the compiled step, NumPy arrays
on the host in float64. A rule has a `name`, `draws` (whether it wants random
numbers) and `weights(xp, groups, draws)`.
"""

import dataclasses
from typing import Any
from typing import ClassVar
from typing import NamedTuple

import keras
import numpy as np

from keras_stab.numerics.cone import Changes
from keras_stab.numerics.cone import solve_changes
from keras_stab.numerics.conflict_averse import change_in_ball
from keras_stab.numerics.interior_point import identity_like
from keras_stab.numerics.interior_point import uniform
from keras_stab.numerics.min_norm import NEGLIGIBLE
from keras_stab.numerics.min_norm import MinNormSolution
from keras_stab.numerics.min_norm import solve_min_norm
from keras_stab.numerics.norms import common_dtype
from keras_stab.numerics.norms import in_full_precision


class Groups(NamedTuple):
    """A Gram matrix, tidied up.

    Attributes:
        gram: `(K, K)`; 0 where a group takes no part.
        takes_part: Booleans `(K,)`: it has rows and a finite gradient.
        broken: Booleans `(K,)`: it has rows and no finite gradient.
        counted: Booleans `(K,)`: it takes part and its gradient is not zero.
        norms: `(K,)`; 1 for those that are not counted.
        correlation: `(K, K)`, the cosines; rows of the identity for those that
            are not counted.
        precision: Name of the dtype that the Gram matrix came in.
    """

    gram: Any
    takes_part: Any
    broken: Any
    counted: Any
    norms: Any
    correlation: Any
    precision: str


def tidied(gram, present):
    """`xp` and the `Groups` of a Gram matrix."""
    if isinstance(gram, np.ndarray):
        return np, _on_host(gram, np.asarray(present, bool))
    ops, gram = keras.ops, in_full_precision(gram)
    present = ops.cast(present, "bool")
    gram = (gram + ops.transpose(gram)) / 2
    finite = ops.isfinite(ops.diagonal(gram))
    takes_part = ops.logical_and(present, finite)
    broken = ops.logical_and(present, ops.logical_not(finite))
    gram = ops.where(takes_part[:, None] & takes_part[None, :], gram, 0.0)
    squares = ops.diagonal(gram)
    # The first condition keeps zeros out where the limit underflows to 0.
    counted = squares > NEGLIGIBLE * ops.max(squares)
    counted = ops.logical_and(squares > 0, counted)
    norms = ops.sqrt(ops.where(counted, squares, 1.0))
    # Two divisions: the product of two norms may overflow or underflow.
    cosines = ops.clip(gram / norms[:, None] / norms[None, :], -1.0, 1.0)
    cosines = ops.where(counted[:, None] & counted[None, :], cosines, 0.0)
    cosines = ops.where(identity_like(ops, norms) > 0, 1.0, cosines)
    return ops, Groups(
        gram, takes_part, broken, counted, norms, cosines, common_dtype([gram])
    )


def _on_host(gram, present):
    """The same; what is usual takes few operations."""
    precision = common_dtype([gram])
    gram = gram.astype("float64")
    gram = (gram + gram.T) / 2
    squares = gram.diagonal()
    takes_part = present & np.isfinite(squares)
    broken = present & ~takes_part
    if not takes_part.all():
        gram = np.where(takes_part[:, None] & takes_part, gram, 0.0)
        squares = gram.diagonal()
    counted = squares > NEGLIGIBLE * squares.max()
    norms = np.sqrt(np.where(counted, squares, 1.0))
    cosines = gram / norms[:, None] / norms
    np.minimum(cosines, 1.0, out=cosines)
    np.maximum(cosines, -1.0, out=cosines)
    if not counted.all():
        cosines *= counted[:, None] & counted
    cosines.flat[:: len(gram) + 1] = 1.0
    return Groups(gram, takes_part, broken, counted, norms, cosines, precision)


def solve_rule(rule, gram, nonfinite, present, draws=None):
    """The weights of a rule, as a `MinNormSolution`.

    Args:
        rule: One of the classes below.
        gram: Tensor or array `(K, K)`.
        nonfinite: As in `min_norm_weights`.
        present: Booleans `(K,)`.
        draws: Uniform random numbers `(K, K)` for a rule that wants them.
    """
    if isinstance(rule, MinNorm):
        return solve_min_norm(gram, rule.zero_groups, nonfinite, present)
    xp, groups = tidied(gram, present)
    weights, residual = rule.weights(xp, groups, draws)
    return as_solution(xp, groups, weights, residual, nonfinite)


def as_solution(xp, groups, weights, residual, nonfinite):
    """The `MinNormSolution` of any weights; those that take no part get 0."""
    weights = xp.where(groups.takes_part, weights, 0.0)
    # Between numbers around 1: squares of norms may overflow.
    lengths = weights * groups.norms
    lengths = xp.where(groups.counted, lengths, 0.0)
    largest = xp.max(xp.abs(lengths))
    unit = lengths / xp.where(largest > 0, largest, 1.0)
    square = xp.sum(groups.correlation * unit[:, None] * unit[None, :])
    norm_squared = square * largest * largest
    if nonfinite == "propagate":
        broken = xp.any(groups.broken)
        present = xp.logical_or(groups.takes_part, groups.broken)
        weights = xp.where(broken, uniform(xp, present, groups.gram), weights)
        norm_squared = xp.where(broken, float("nan"), norm_squared)
    return MinNormSolution(
        weights, residual, norm_squared, xp.logical_not(groups.takes_part)
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of the rules.

    Attributes:
        is_shortest: Whether the combination is never longer than the mean.
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = False
    is_shortest: ClassVar[bool] = False

    def weights(self, xp, groups, draws):
        """Weights `(K,)` and the residual of the solver, a scalar."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MinNorm(Rule):
    """The shortest convex combination; see `min_norm_weights`."""

    name = "min_norm"
    is_shortest = True
    zero_groups: str = "exclude"


@dataclasses.dataclass(frozen=True)
class Mean(Rule):
    """Equal weights."""

    name = "mean"

    def weights(self, xp, groups, draws):
        return uniform(xp, groups.takes_part, groups.gram), _zero(xp, groups)


@dataclasses.dataclass(frozen=True)
class UPGrad(Rule):
    """The mean of the projections on the cone without conflicts."""

    name = "upgrad"

    def weights(self, xp, groups, draws):
        problem = Changes(
            groups.correlation, -groups.correlation, groups.counted
        )
        y, residuals = solve_changes(xp, problem, groups.precision)
        pairs = groups.counted[:, None] & groups.counted[None, :]
        ratio = groups.norms[:, None] / groups.norms[None, :]
        added = xp.sum(xp.where(pairs, y * ratio, 0.0), axis=0)
        mean = uniform(xp, groups.takes_part, groups.gram)
        return mean + added * xp.max(mean), xp.max(residuals)


@dataclasses.dataclass(frozen=True)
class PCGrad(Rule):
    """The mean of gradients from which conflicts are projected away in turn.

    Each gradient meets the others in an order of its own, by random numbers.
    """

    name = "pcgrad"
    draws = True

    def weights(self, xp, groups, draws):
        order = xp.argsort(draws, axis=1)
        size = draws.shape[0]
        positions = xp.arange(size)
        if xp is not np:
            positions = keras.ops.cast(positions, order.dtype)
        others = identity_like(xp, groups.norms) == 0
        pairs = groups.counted[:, None] & groups.counted[None, :] & others

        def meet(t, rows):
            # Row i: the multiples of all unit vectors in what g_i became.
            met = xp.take(order, t, axis=1)
            this = xp.logical_and(positions[None, :] == met[:, None], pairs)
            slopes = xp.sum(rows * xp.take(groups.correlation, met, axis=0), 1)
            missing = xp.maximum(-slopes, 0.0)[:, None]
            return rows + xp.where(this, missing, 0.0)

        rows = identity_like(xp, groups.norms)
        if xp is np:
            for t in range(size):
                rows = meet(t, rows)
        else:
            rows = keras.ops.fori_loop(0, size, meet, rows)
        ratio = groups.norms[:, None] / groups.norms[None, :]
        added = xp.sum(xp.where(pairs, rows * ratio, 0.0), axis=0)
        mean = uniform(xp, groups.takes_part, groups.gram)
        return mean + added * xp.max(mean), _zero(xp, groups)


@dataclasses.dataclass(frozen=True)
class CAGrad(Rule):
    """The best worst group within a ball around the mean.

    Attributes:
        c: The radius of the ball, as a share of the norm of the mean.
    """

    name = "cagrad"
    c: float = 0.5

    def weights(self, xp, groups, draws):
        mean = uniform(xp, groups.takes_part, groups.gram)
        change, residual = change_in_ball(xp, groups, mean, self.c)
        return mean + change, residual


def _zero(xp, groups):
    return xp.sum(groups.gram) * 0.0


RULES = {
    rule.name: rule
    for rule in (MinNorm(), Mean(), UPGrad(), PCGrad(), CAGrad())
}
