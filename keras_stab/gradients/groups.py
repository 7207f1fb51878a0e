"""GroupGradients: what an engine answers about K groups of rows."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_stab.backend import exchange
from keras_stab.backend import products
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.plan import Plan
from keras_stab.numerics.norms import in_full_precision
from keras_stab.types import Tensor


class GroupGradients:
    r"""The gradients of K groups, reachable by their products.

    $g_k$ is the gradient of the model's own loss on the rows of group k, or of
    its loss number k on all rows, over all trainable variables together. The
    questions

    $$
    G_{ij} = \langle g_i, g_j \rangle, \qquad
    \sum_k \lambda_k g_k, \qquad \langle g_k, v \rangle
    $$

    are `gram()`, `combine(weights)` and `inner(vector)`. An engine answers
    them without forming K gradients where it can. `group_gradients` and
    `loss_gradients` of a `GradientOracle` make one; it lives as long as its
    train step.

    Attributes:
        sizes: Rows in each group, a list of K ints, or scalar tensors when
            the batch dimension is unknown while the step is traced.
        present: Booleans `(K,)`, `False` for a group without rows; an array
            where the sizes are known.
        rows: Rows in the batch, an int or a scalar tensor.
        plan: Which engine answers, and why.
    """

    sizes: list[Any]
    present: Any
    rows: Any
    plan: Plan

    def gram(self) -> Tensor:
        """The inner products of the group gradients.

        One inner product over all trainable variables together, of the
        unscaled loss, in full precision. Rows and columns of groups without
        rows are zero; those of a gradient that is not finite hold NaN.

        Returns:
            Tensor `(K, K)`, of float32 or, for weights of float64, float64.
        """
        raise NotImplementedError

    def combine(self, weights: Tensor, whole: bool = True) -> list[Any]:
        """The combination `sum_k weights[k] g_k`, one tensor per variable.

        Args:
            weights: Tensor `(K,)`. A group of weight 0 does not enter, even
                when its gradient is not finite.
            whole: Whether each replica of a strategy gets all of it. Otherwise
                it may get what it has of it, so that the mean over the
                replicas is the combination, as for the gradients of a loss.
                Defaults to `True`.

        Returns:
            List in the order of `model.trainable_variables`; `None` for a
            variable that no group's loss depends on.
        """
        raise NotImplementedError

    def inner(self, vector: Sequence[Any]) -> Tensor:
        """The inner product of each group gradient with one vector.

        Args:
            vector: List of tensors, one per trainable variable, as `gradient`
                or `combine` return it; `None` stands for zeros.

        Returns:
            Tensor `(K,)`, in full precision; 0 for a group without rows.

        Raises:
            ValueError: Where several devices share the batch.
        """
        if exchange.batch_shares() > 1:
            raise ValueError(
                "Inner products with a vector are not formed where several "
                "devices share a batch. Use `gram`, which holds those of the "
                f"groups. Received: {exchange.batch_shares()} devices"
            )
        parts = [
            self._padded(products.inner_products(stack, _dense(part)))
            for stack, part in zip(self.stacks(), vector)
            if stack is not None and part is not None
        ]
        if not parts:
            return keras.ops.zeros((len(self.sizes),), "float32")
        return products.total(parts)

    def stacks(self) -> list[Any]:
        """The gradients themselves, `(K, *shape)` for each variable.

        `None` where there is none. They need K times the memory of a gradient.
        Trailing groups without rows may be left out.
        """
        raise NotImplementedError

    def _padded(self, numbers):
        """Numbers of the groups that have rows, with 0 for the others."""
        missing = len(self.sizes) - numbers.shape[0]
        return keras.ops.pad(numbers, [[0, missing]]) if missing else numbers


class StoredGradients(GroupGradients):
    """Those of which each exists.

    Where several devices share the batch, each holds a slice of all of them.

    Args:
        oracle: The `GradientOracle`.
        cut: What `exchange.cut` made of gradients of the scaled loss.
        shapes: Those of the variables; `None` where there is no gradient.
        factor: Float, by which the gradients are multiplied too.

    Attributes:
        aligned: Whether each device had groups of its own.
        summed_whole: Whether K gradients were summed before they were cut.
    """

    aligned = summed_whole = False

    def __init__(self, oracle, cut, shapes, factor=1.0):
        scale = oracle.loss_scale
        if factor != 1.0:
            scale = (1.0 if scale is None else scale) / factor
        if scale is not None:
            cut = cut.divided_by(scale)
        self.sizes = cut.sizes
        self.rows = sum(cut.sizes)
        self.present = rows.present(cut.sizes)
        self._oracle = oracle
        self._cut = cut
        self._shapes = shapes

    def traffic(self, weights, groups, aligned):
        """As `exchange.traffic`."""
        if self.summed_whole:  # by the compiler, and one gathered
            return exchange.traffic(
                weights, groups, aligned, (2 * groups + 1) * weights
            )
        return exchange.traffic(weights, groups, aligned or self.aligned)

    def gram(self):
        total = self._cut.gram()
        missing = len(self.sizes) - self._cut.evaluated()
        if missing:
            total = keras.ops.pad(total, [[0, missing], [0, missing]])
        return total

    def combine(self, weights, whole=True):
        weights = exchange.alike(weights)[: self._cut.evaluated()]
        combined = self._cut.combine(weights, whole)
        combined = iter(products.unpack_group(combined, self._present_shapes()))
        answer = []
        for variable, shape in zip(self._oracle.variables, self._shapes):
            if shape is None:
                answer.append(None)
            else:
                answer.append(keras.ops.cast(next(combined), variable.dtype))
        return answer

    def stacks(self):
        pieces = iter(
            products.unpack_groups(self._cut.stacks(), self._present_shapes())
        )
        return [None if s is None else next(pieces) for s in self._shapes]

    def _present_shapes(self):
        return [shape for shape in self._shapes if shape is not None]


def collected(oracle, gradients, sizes, aligned, factor=1.0):
    """Brings the K gradients of every variable together.

    Args:
        oracle: The `GradientOracle`.
        gradients: K lists of tensors or `None`; or a list of stacks.
        sizes: Rows in each group.
        aligned: As for `exchange.cut`.
        factor: As for `StoredGradients`.
    """
    variables = oracle.variables
    if isinstance(gradients[0], list):
        columns = list(zip(*gradients))
    else:
        columns = gradients  # already stacked by a scan
    shapes, stacks, lists = [], [], []
    for variable, column in zip(variables, columns):
        stacked = not isinstance(column, tuple)
        if stacked:
            missing = column is None
        else:
            known = [g for g in column if g is not None]
            missing = not known
            # A group that does not reach a variable contributes zero to it.
            column = [
                keras.ops.zeros_like(known[0]) if g is None and known else g
                for g in column
            ]
        if missing:
            shapes.append(None)
        else:
            shapes.append(tuple(variable.shape))
            (stacks if stacked else lists).append(column)
    if lists:
        packed = products.pack_groups(list(zip(*lists)))
    else:
        packed = [in_full_precision(s) for s in stacks]
    cut = exchange.cut(packed, sizes, aligned)
    return StoredGradients(oracle, cut, shapes, factor)


def _dense(gradient):
    return in_full_precision(tracing.densify(gradient))
