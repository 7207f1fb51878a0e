"""The window across batches: K gradients and their Gram matrix."""

from typing import Any

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import group_weights
from keras_stab.backend import products
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.numerics.gram_measures import GROUP_MEASURES
from keras_stab.optimizers.restart import Restarts
from keras_stab.optimizers.state import slot_name
from keras_stab.optimizers.state import widest_dtype


class HasWindow(Restarts):
    """Mixin of the method that a `BatchWindow`, if any, belongs to."""

    _window: Any = None

    def remembers(self) -> bool:
        return self._window is not None and self._window.is_open()

    def begin_again(self) -> None:
        if self._window is not None:
            self._window.empty()


class BatchWindow:
    """Collects K successive gradients, then makes one step from them.

    Each call stores one gradient and one row of the Gram matrix; the K-th
    call solves and applies. Everything is an optimizer variable: a window that
    is open when training stops is saved, and goes on after a resume.
    """

    def __init__(self, optimizer, variables, groups):
        self._optimizer = optimizer
        self._groups = groups
        self._slots = [
            _add_slots(optimizer, variable, groups)
            for variable in variables
            if not variable.overwrite_with_gradient
        ]
        self._gram = optimizer.add_variable(
            shape=(groups, groups),
            dtype=widest_dtype(variables),
            name="window_gram",
        )
        self._filled = optimizer.add_variable(
            shape=(), dtype="int32", name="window_filled"
        )

    def is_open(self):
        """Whether gradients wait for others; read from the device."""
        return int(tracing.read(self._filled)) % self._groups > 0

    def empty(self):
        """Drops the gradients, for example when other weights were loaded."""
        self._filled.assign(0)

    def push(self, gradients, variables, note):
        """Stores one gradient; applies the combination of K.

        A gradient that is not finite is not stored: the next batch takes its
        place, and `nonfinite` of the measures counts it. A missing gradient
        counts as zero.

        Args:
            note: Weights and measures of the last window.

        Returns:
            Those of this window when the call closes it, else `note`.
        """
        ops = keras.ops
        if not devices.updates_under_conditions():
            raise ValueError(
                'across="batches" cannot update under a tf.distribute '
                "strategy, which allows no conditional update in a replica. "
                "Use across=None, which shares the groups over all replicas"
            )
        gradients = _overwritten(gradients, variables)
        grads = [
            ops.zeros(v.shape, widest_dtype([v]))
            if g is None
            else ops.cast(tracing.densify(g), widest_dtype([v]))
            for g, v in zip(gradients, variables)
            if not v.overwrite_with_gradient
        ]
        wide = self._gram.dtype
        squares = [ops.cast(ops.sum(ops.square(g)), wide) for g in grads]
        finite = ops.isfinite(sum(squares[1:], squares[0]))
        # The batches that were skipped are counted in the same variable.
        index = self._filled.value % self._groups
        skipped = self._filled.value // self._groups
        skipped = skipped + ops.cast(ops.logical_not(finite), "int32")
        for slot, gradient in zip(self._slots, grads):
            stored = slot.value[index]
            updates.write_slot(slot, index, ops.where(finite, gradient, stored))
        row = sum(
            ops.cast(products.inner_products(slot.value, gradient), wide)
            for slot, gradient in zip(self._slots, grads)
        )
        # Entries of slots that are not filled yet belong to the window before;
        # they are overwritten when their turn comes.
        at_index = ops.arange(self._groups, dtype="int32") == index
        old = self._gram.value
        gram = ops.where(at_index[:, None], row[None, :], old)
        gram = ops.where(at_index[None, :], row[:, None], gram)
        gram = ops.where(finite, gram, old)
        self._gram.assign(gram)
        filled = index + ops.cast(finite, "int32")
        closing = filled == self._groups
        kept = filled + self._groups * skipped
        self._filled.assign(ops.where(closing, 0, kept))
        weights, measures = ops.cond(
            closing,
            lambda: [
                ops.cast(value, old.dtype)
                for value, old in zip(self._solved(gram), note)
            ],
            lambda: list(note),
        )
        is_count = np.array(GROUP_MEASURES) == "nonfinite"
        due = ops.logical_or(closing, ops.logical_not(finite))
        measures = ops.where(
            ops.logical_and(due, is_count),
            ops.cast(skipped, measures.dtype),
            measures,
        )

        def combination():
            slots = iter(self._slots)
            answer = []
            for gradient, variable in zip(gradients, variables):
                if not variable.overwrite_with_gradient:
                    combined = group_weights.combine(weights, next(slots).value)
                    if gradient is not None:
                        gradient = ops.cast(combined, variable.dtype)
                answer.append(gradient)
            return answer

        updates.apply_gradients_if(
            closing, self._optimizer.inner_optimizer, combination, variables
        )
        return weights, measures

    def _solved(self, gram):
        everyone = keras.ops.ones((self._groups,), dtype="bool")
        return self._optimizer.solve(gram, everyone, "drop")


def _overwritten(gradients, variables):
    """Gives variables that are not weights their new values at every batch.

    Scales of float8 layers do not wait for the window to close.
    """
    if any(v.overwrite_with_gradient for v in variables):
        gradients = updates.barrier(gradients)
    for gradient, variable in zip(gradients, variables):
        if variable.overwrite_with_gradient and gradient is not None:
            variable.assign(gradient)
    return gradients


def _add_slots(optimizer, variable, groups):
    return optimizer.add_variable(
        shape=(groups, *variable.shape),
        dtype=widest_dtype([variable]),
        layout=_slot_layout(variable),
        name=slot_name(variable, "window"),
    )


def _slot_layout(variable):
    """The layout of the variable, with an axis in front that is not sharded.

    Otherwise every device would keep K whole gradients, or a pattern of the
    user's layout map that fits the slot's name would shard the wrong axes.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    layout = distribution.get_variable_layout(variable)
    if not isinstance(layout, keras.distribution.TensorLayout):
        return None
    return keras.distribution.TensorLayout(
        (None, *layout.axes), layout.device_mesh
    )
