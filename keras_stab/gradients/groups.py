"""GroupGradients: what an engine answers about K groups of rows."""

import keras

from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.gradients import rows


class GroupGradients:
    """The gradients of K groups of rows, reachable by two questions.

    Attributes:
        sizes: Rows in each group, a list of K ints, or scalar tensors when
            the batch dimension is unknown.
        present: Booleans `(K,)`, `False` for a group without rows; an array
            where the sizes are known.
        rows: Rows in the batch.
    """

    def __init__(self, oracle, packed, shapes, sizes):
        self.sizes = sizes
        self.rows = sum(sizes)
        self.present = rows.present(sizes)
        self._oracle = oracle
        self._packed = packed
        self._shapes = shapes

    def gram(self):
        """Inner products of the group gradients, `(K, K)`, in full precision.

        One inner product over all trainable variables together. Rows and
        columns of groups without rows are zero.
        """
        total = products.total(
            [products.inner_products(stack) for stack in self._packed]
        )
        missing = len(self.sizes) - self._evaluated()
        if missing:
            total = keras.ops.pad(total, [[0, missing], [0, missing]])
        return total

    def combine(self, weights):
        """The combination `sum_k weights[k] g_k`, one tensor per variable.

        Args:
            weights: Tensor `(K,)`. A group of weight 0 does not enter, even
                when its gradient is not finite.
        """
        weights = weights[: self._evaluated()]
        combined = [group_weights.combine(weights, s) for s in self._packed]
        combined = iter(products.unpack_group(combined, self._present_shapes()))
        answer = []
        for variable, shape in zip(self._oracle.variables, self._shapes):
            if shape is None:
                answer.append(None)
            else:
                answer.append(keras.ops.cast(next(combined), variable.dtype))
        return answer

    def _evaluated(self):
        return self._packed[0].shape[0] if self._packed else len(self.sizes)

    def _present_shapes(self):
        return [shape for shape in self._shapes if shape is not None]
