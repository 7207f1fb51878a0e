"""Which rows of a batch belong to which group, and cutting them so.

A size is a Python int, or on TensorFlow a scalar tensor when the batch
dimension is unknown while the step is traced.
"""

import keras

from keras_stab.backend import exchange
from keras_stab.backend import products
from keras_stab.gradients import rows

RULES = ("interleaved", "contiguous")


def grouping_of(rule, groups):
    """The `Grouping` of a name in `RULES`."""
    return {"interleaved": Interleaved, "contiguous": Contiguous}[rule](groups)


def grouping_for(rule, groups):
    """The `Grouping` of the rows that a step sees.

    Args:
        rule: A name in `RULES`; or `"replicas"`: contiguous, and every group
            lies whole on one of the devices that share the batch.
        groups: K, over all devices.
    """
    own = exchange.sees_own_rows()
    if own and rule == "contiguous":
        raise ValueError(
            'With grouping="contiguous" a replica would have rows of some '
            "groups alone. Here the groups are to be those of the replicas: "
            'use GRAIN(across="replicas"), with `groups` for each replica. '
            f"Received: {exchange.batch_shares()} replicas"
        )
    shares = exchange.batch_shares()
    if rule != "replicas":
        grouping = grouping_of(rule, groups)
        grouping.aligned = rule == "contiguous" and groups % shares == 0
        return grouping
    if groups % shares:
        raise ValueError(
            "Every device has equally many groups. Received: "
            f"groups={groups} on {shares} devices"
        )
    grouping = Contiguous(groups // shares if own else groups)
    grouping.aligned = True
    return grouping


class Grouping:
    """B rows in K groups.

    Attributes:
        groups: K, or those of this replica alone.
        rule: Its name in `RULES`.
        aligned: Whether every group lies whole on one of several devices,
            where the rows are cut evenly.
    """

    rule: str
    aligned = False

    def __init__(self, groups):
        self.groups = groups

    def sizes(self, size):
        """Rows in each group of a batch, a list; the empty ones come last."""
        raise NotImplementedError

    def longest(self, size):
        """Rows in the largest group."""
        return (size + self.groups - 1) // self.groups

    def no_single_rows(self, size):
        """Whether no group has only one row."""
        raise NotImplementedError

    def take(self, data, k, size):
        """The rows of group k, from any nested structure of tensors."""
        raise NotImplementedError

    def stack(self, data):
        """Tensors `[K, B/K, ...]` whose slice k is group k; K divides B."""
        raise NotImplementedError

    def unstack(self, data):
        """Undoes `stack`: from `[K, B/K, ...]` back to rows in order."""
        raise NotImplementedError

    def merge(self, parts, size):
        """Puts the outputs of all groups back into the order of the rows."""
        raise NotImplementedError


class Interleaved(Grouping):
    """Row i belongs to group i mod K.

    Groups do not depend on the number of devices, and the rows of each stay
    spread over the devices that share a batch.
    """

    rule = "interleaved"

    def sizes(self, size):
        groups = self.groups
        return [(size - k + groups - 1) // groups for k in range(groups)]

    def no_single_rows(self, size):
        return size >= 2 * self.groups

    def take(self, data, k, size):
        return rows.map_tensors(lambda leaf: leaf[k :: self.groups], data)

    def stack(self, data):
        def split(leaf):
            leaf = products.reshape(leaf, _split_shape(leaf, self.groups, 1))
            return products.swapaxes(leaf, 0, 1)

        return rows.map_tensors(split, data)

    def unstack(self, data):
        def merge(leaf):
            return rows.merge_first_axes(products.swapaxes(leaf, 0, 1))

        return rows.map_tensors(merge, data)

    def merge(self, parts, size):
        groups = len(parts)
        if groups == 1:
            return parts[0]
        common = size // groups

        def merge(*leaves):
            if leaves[0] is None:
                return None
            _check_rows(leaves)
            main = keras.ops.stack([leaf[:common] for leaf in leaves], axis=1)
            rest = keras.ops.shape(leaves[0])[1:]
            main = products.reshape(main, (common * groups,) + tuple(rest))
            if rows.is_static(size) and size % groups == 0:
                return main
            # Groups that got one row more than the others, in their order.
            tails = [leaf[common:] for leaf in leaves]
            return keras.ops.concatenate([main, *tails], axis=0)

        return keras.tree.map_structure(merge, *parts, none_is_leaf=True)


class Contiguous(Grouping):
    """Group k is the k-th block of successive rows, of B/K rounded up.

    Where that is not even, the last groups are shorter or empty. It is how a
    batch is dealt out to devices: a group then lies whole on one.
    """

    rule = "contiguous"

    def sizes(self, size):
        ends = self._ends(size)
        return [end - first for first, end in zip(ends, ends[1:])]

    def no_single_rows(self, size):
        longest = self.longest(size)
        if rows.is_static(size):
            return longest > 1 and size % longest != 1
        return keras.ops.logical_and(
            longest > 1, size % keras.ops.maximum(longest, 1) != 1
        )

    def take(self, data, k, size):
        first, end = self._ends(size)[k : k + 2]
        return rows.map_tensors(lambda leaf: leaf[first:end], data)

    def _ends(self, size):
        """Where each group begins, and the last one ends."""
        longest = self.longest(size)
        minimum = min if rows.is_static(size) else keras.ops.minimum
        return [minimum(k * longest, size) for k in range(self.groups + 1)]

    def stack(self, data):
        def split(leaf):
            return products.reshape(leaf, _split_shape(leaf, self.groups, 0))

        return rows.map_tensors(split, data)

    def unstack(self, data):
        return rows.map_tensors(rows.merge_first_axes, data)

    def merge(self, parts, size):
        if len(parts) == 1:
            return parts[0]

        def merge(*leaves):
            if leaves[0] is None:
                return None
            _check_rows(leaves)
            return keras.ops.concatenate(leaves, axis=0)

        return keras.tree.map_structure(merge, *parts, none_is_leaf=True)


def _split_shape(leaf, groups, axis):
    """That of a leaf with K groups as its axis 0 or 1, rows as the other."""
    # -1 even where B/K is known: otherwise TensorFlow's graph optimizer
    # would let this run before the checks of lengths.
    shape = tuple(leaf.shape)
    empty = shape[0] is not None and 0 in shape
    count = shape[0] // groups if empty else -1
    if None in shape[1:]:
        shape = tuple(keras.ops.shape(leaf))
    both = (groups, count) if axis == 0 else (count, groups)
    return both + shape[1:]


def _check_rows(leaves):
    for leaf in leaves:
        if len(leaf.shape) == 0:
            raise ValueError(
                "The model returned a scalar where one row per sample is "
                "expected, so the outputs of the groups cannot be put "
                "together. Use add_loss for scalar losses"
            )
