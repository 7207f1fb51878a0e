"""Group gradients of the replicas of `tf.distribute`.

For the inner products every device is given a slice along the weights of all K
gradients, copied from device to device: the strategy has no collective that
does so, but in its cross-replica context every tensor can be read. The K x K
sums over slices it adds up itself. The combination needs no exchange of its
own: each replica weights what it has of the K gradients, and the strategy adds
that up as it adds up the gradients of a plain step.
"""

import copy
import math

from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.backend.devices import BACKEND
from keras_stab.backend.devices import replicas
from keras_stab.backend.devices import sum_over_replicas

if BACKEND == "tensorflow":
    import tensorflow as tf


class ReplicaGroups:
    """K gradients, of which each replica has its part.

    Keras gives a replica 1/R of the gradient of its own mean loss. That adds
    up to the mean over all rows only where every replica has equally many;
    in a short batch it does not, and one may have none of a group. So group k,
    of n_k rows on a replica and N_k in all, is weighted by R n_k / N_k.

    Args:
        stacks: List of tensors in full precision, the gradients of the rows
            of this replica. `[m, *shape]` where it has groups of its own,
            else `[K, *shape]` (fewer where the last groups have no rows).
        sizes: Rows of this replica in each of these groups.
        aligned: Whether it has groups of its own.

    Attributes:
        sizes: Rows in each of the K groups, over all replicas.
    """

    def __init__(self, stacks, sizes, aligned):
        self._aligned = aligned
        own = tf.cast(tf.stack(sizes), "float64")
        first = len(sizes) * _place() if aligned else 0
        self._own = slice(first, first + len(sizes))
        # As one float tensor: tf.distribute refuses to add several int32
        # tensors at a time, and not every collective of a GPU knows integers.
        counts = _among_all(own) if aligned else own
        (total,) = sum_over_replicas([counts])
        self.sizes = tf.unstack(tf.cast(total, "int32"))
        rows = own if aligned else total
        factors = replicas() * tf.math.divide_no_nan(own, rows)
        self._stacks = [_times_rows(stack, factors) for stack in stacks]

    def divided_by(self, scale):
        """The same, divided by a scalar: that of a loss scaler."""
        answer = copy.copy(self)
        answer._stacks = [s / tf.cast(scale, s.dtype) for s in self._stacks]
        return answer

    def evaluated(self):
        """Of how many groups there is a gradient; the others are empty."""
        if self._aligned or not self._stacks:
            return len(self.sizes)
        return self._stacks[0].shape[0]

    def gram(self):
        """Inner products of the gradients; the same on every replica."""
        by_dtype = {}
        for stack in self._stacks:
            flat = tf.reshape(stack, (stack.shape[0], -1))
            by_dtype.setdefault(stack.dtype, []).append(flat)
        slices = [
            _slices(tf.concat(flat, axis=1), self._aligned)
            for flat in by_dtype.values()
        ]
        own = products.total([products.inner_products(s) for s in slices])
        return sum_over_replicas([own])[0]

    def combine(self, weights, on_all=True):
        """Combinations of the gradients, a list of tensors `[*shape]`.

        Args:
            weights: Tensor with a number for each group.
            on_all: Whether to add up what replicas have of them. Otherwise
                their mean over the replicas is the combination: the share
                that an optimizer expects.
        """
        if not self._stacks:
            return []
        weights = weights[self._own][: self._stacks[0].shape[0]]
        parts = [group_weights.combine(weights, s) for s in self._stacks]
        if on_all:
            return sum_over_replicas(parts)
        return [part * tf.cast(replicas(), part.dtype) for part in parts]


def _place():
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _among_all(own):
    """The numbers of this replica in its place among those of all, else 0."""
    mine = tf.range(replicas()) == _place()
    zero = tf.zeros((), own.dtype)
    return tf.reshape(tf.where(mine[:, None], own[None, :], zero), (-1,))


def _times_rows(stack, factors):
    """What a group without rows has, which may be no number, becomes 0."""
    column = factors[: stack.shape[0]]
    column = tf.reshape(column, (-1,) + (1,) * (len(stack.shape) - 1))
    column = tf.cast(column, stack.dtype)
    return tf.where(column > 0.0, column * stack, tf.zeros((), stack.dtype))


def _slices(matrix, aligned):
    """Of all K gradients, a slice along the weights for every device.

    From `[m, P]` to `[m R, P/R]` where the groups of the replicas differ, else
    from `[K, P]`, parts of the same groups, to the sum of them, `[K, P/R]`.
    """
    count = replicas()
    width = math.ceil(matrix.shape[1] / count)
    missing = width * count - matrix.shape[1]
    matrix = tf.pad(matrix, [[0, 0], [0, missing]])

    def exchange(strategy, matrix):
        parts = strategy.experimental_local_results(matrix)
        pieces = []
        for part in parts:
            with tf.device(part.device):
                pieces.append(tf.split(part, count, axis=1))
        slices = []
        for i, part in enumerate(parts):
            with tf.device(part.device):
                own = [piece[i] for piece in pieces]
                slices.append(tf.concat(own, 0) if aligned else tf.add_n(own))
        return strategy.experimental_distribute_values_from_function(
            lambda context: slices[context.replica_id_in_sync_group]
        )

    context = tf.distribute.get_replica_context()
    return context.merge_call(exchange, args=(matrix,))
