"""GroupGradients: what an engine answers about K groups of rows."""

import keras

from keras_stab.backend import exchange
from keras_stab.backend import products
from keras_stab.gradients import rows


class GroupGradients:
    """The gradients of K groups of rows, reachable by two questions.

    Where several devices share the batch, each holds a slice of all of them.

    Attributes:
        sizes: Rows in each group, a list of K ints, or scalar tensors when
            the batch dimension is unknown.
        present: Booleans `(K,)`, `False` for a group without rows; an array
            where the sizes are known.
        rows: Rows in the batch.
        aligned: Whether each device had groups of its own.
        summed_whole: Whether K gradients were summed before they were cut.
    """

    aligned = summed_whole = False

    def __init__(self, oracle, cut, shapes):
        if oracle.loss_scale is not None:
            cut = cut.divided_by(oracle.loss_scale)
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
        """Inner products of the group gradients, `(K, K)`, in full precision.

        One inner product over all trainable variables together. Rows and
        columns of groups without rows are zero.
        """
        total = self._cut.gram()
        missing = len(self.sizes) - self._cut.evaluated()
        if missing:
            total = keras.ops.pad(total, [[0, missing], [0, missing]])
        return total

    def combine(self, weights, whole=True):
        """The combination `sum_k weights[k] g_k`, one tensor per variable.

        Args:
            weights: Tensor `(K,)`. A group of weight 0 does not enter, even
                when its gradient is not finite.
            whole: Whether each replica of a strategy gets all of it. Otherwise
                it may get what it has of it, so that the mean over the
                replicas is the combination, as for the gradients of a loss.
        """
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
        """The gradients themselves, `(K, *shape)` for each variable.

        `None` where there is none. Trailing groups without rows are left out.
        """
        pieces = iter(
            products.unpack_groups(self._cut.slices, self._present_shapes())
        )
        return [None if s is None else next(pieces) for s in self._shapes]

    def _present_shapes(self):
        return [shape for shape in self._shapes if shape is not None]
