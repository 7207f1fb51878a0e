"""How the rows of groups lie in the tensors that layers see."""

import keras
import numpy as np

from keras_stab.backend import exchange
from keras_stab.backend import products
from keras_stab.backend import tracing
from keras_stab.gradients import rows
from keras_stab.gradients.grouping import Interleaved


class Layout:
    """The rows of a batch of B while a model runs, and their groups in tensors.

    When K divides B, the rows are put group by group once, at the input, so
    that every layer sees K blocks. Otherwise they stay where they are and
    each tensor is padded with rows of zeros when its groups are formed (also
    with `sorts=False`, where devices share the rows, which then need not move).

    A tensor inside the model may have B c leading rows, c for each row of the
    batch (a reshape of `[B, T, d]` to `[B T, d]` has).
    """

    def __init__(self, batch, groups, sorts=True, grouping=None):
        self.groups = groups
        self.grouping = grouping or Interleaved(groups)
        self.size = rows.batch_size(*batch)
        rows.check_not_empty(self.size)
        self.sizes = self.grouping.sizes(self.size)
        self.is_static = rows.is_static(self.size)
        self.is_even = self.is_static and self.size % groups == 0
        self._in_blocks = self.grouping.rule == "contiguous"
        # Whether each group is a block of successive rows.
        self.sorted = self.is_even and (sorts or self._in_blocks)
        # Whether each lies whole on one of the devices that share the rows.
        self.is_aligned = self.sorted and groups % exchange.batch_shares() == 0
        # A step that runs eagerly may be given arrays.
        self.batch = rows.as_tensors(batch)
        conditions = rows.length_checks(batch)
        if conditions:
            self.batch = tracing.checked(self.batch, conditions)
        if self.sorted and not self._in_blocks:
            stacked = self.grouping.stack(self.batch)
            self.batch = rows.map_tensors(_merged_rows, stacked)

    def group(self, data, k):
        """The rows of group k, from a structure of tensors of B c rows."""

        def cut(tensor):
            if self.sorted:
                share = tensor.shape[0] // self.groups
                return tensor[k * share : (k + 1) * share]
            if tensor.shape[0] == self.size:
                return self.grouping.take(tensor, k, self.size)
            by_row = self._by_row(tensor)
            return rows.merge_first_axes(
                self.grouping.take(by_row, k, self.size)
            )

        return rows.map_tensors(cut, data)

    def stack(self, tensor):
        """From `[B c, ...]` to `[K, n c, ...]`, padded with zeros."""
        rest = tuple(tensor.shape[1:])
        if self.sorted:
            return products.reshape(tensor, (self.groups, -1) + rest)
        missing = -self.size % self.groups
        tensor = self._by_row(tensor)
        shape = keras.ops.shape(tensor)
        zeros = keras.ops.zeros((missing, shape[1]) + rest, tensor.dtype)
        tensor = keras.ops.concatenate([tensor, zeros], axis=0)
        if self._in_blocks:
            return products.reshape(tensor, (self.groups, -1) + rest)
        # [n, K, c, ...]: the rows of a group are K apart.
        shape = keras.ops.shape(tensor)
        tensor = products.reshape(
            tensor,
            (shape[0] // self.groups, self.groups, shape[1]) + rest,
        )
        tensor = products.swapaxes(tensor, 0, 1)
        return products.reshape(tensor, (self.groups, -1) + rest)

    def _own_rows(self):
        """Which rows `[K, n]` of padded groups are none of padding."""
        longest = self._longest()
        index = keras.ops.arange(longest * self.groups, dtype="int32")
        if self._in_blocks:
            return products.reshape(index < self.size, (self.groups, longest))
        own = products.reshape(index < self.size, (longest, self.groups))
        return products.swapaxes(own, 0, 1)

    def unstack(self, tensor):
        """From `[K, n c, ...]`, padded, back to `[B c, ...]`."""
        rest = tuple(tensor.shape[2:])
        if self.sorted:
            return products.reshape(tensor, (-1, *rest))
        length = tensor.shape[1] or keras.ops.shape(tensor)[1]
        positions = length // self._longest()
        if not self._in_blocks:
            shape = (self.groups, self._longest(), positions, *rest)
            tensor = products.reshape(tensor, shape)
            tensor = products.swapaxes(tensor, 0, 1)
        return products.reshape(tensor, (-1, *rest))[: self.size * positions]

    def members(self, stacked):
        """Which rows of a tensor `[K, n c, ...]` are none of padding, `[K, n c,
        1, ...]`; `None` where all are.
        """
        if self.is_even:
            return None
        longest = self._longest()
        own = self._own_rows()[:, :, None]
        length = stacked.shape[1] or keras.ops.shape(stacked)[1]
        shape = (self.groups, longest, length // longest)
        own = keras.ops.broadcast_to(own, shape)
        ones = (1,) * (len(stacked.shape) - 2)
        return products.reshape(own, (self.groups, -1, *ones))

    def shares(self):
        """The part of the rows that each group has, `[K]`, in float64."""
        if self.is_static:
            return np.array(self.sizes) / self.size
        sizes = keras.ops.cast(keras.ops.stack(self.sizes), "float64")
        return sizes / keras.ops.cast(self.size, "float64")

    def _longest(self):
        return self.grouping.longest(self.size)

    def spread(self, tensor):
        """A copy of the tensor for each row; see `spread_over`."""
        return spread_over(tensor, self.size)

    def restore(self, data):
        """Outputs of the model, back in the order of the rows."""
        if self._in_blocks or not self.sorted:
            return data
        data = self.grouping.unstack(rows.map_tensors(self.stack, data))
        return rows.map_tensors(exchange.with_shared_rows, data)

    def _by_row(self, tensor):
        """From `[B c, ...]` to `[B, c, ...]`."""
        rest = tuple(tensor.shape[1:])
        if tensor.shape[0] is None:
            return products.reshape(
                tensor,
                (self.size, keras.ops.shape(tensor)[0] // self.size) + rest,
            )
        return products.reshape(
            tensor, (self.size, tensor.shape[0] // self.size) + rest
        )


def _merged_rows(stacked):
    return exchange.with_shared_rows(rows.merge_first_axes(stacked))


def spread_over(tensor, size):
    """From `[1, ...]` to `[size, ...]`; `[m, ...]` to `[size, m, ...]`.

    Where tensors of the batch are combined element by element, this changes
    nothing but the number of rows.
    """
    shape = tuple(tensor.shape)
    if shape[:1] == (1,):
        shape = shape[1:]
    return keras.ops.broadcast_to(tensor, (size, *shape))
