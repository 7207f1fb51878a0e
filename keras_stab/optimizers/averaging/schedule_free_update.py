"""The update of ScheduleFree: iterate and average."""

from typing import Any

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import in_place
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import update_kernel
from keras_stab.backend import updates
from keras_stab.numerics.averaging import Numbers
from keras_stab.numerics.averaging import schedule_free
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.state import moving


class ScheduleFreeUpdate(GradientMethod):
    """What `ScheduleFree` does with a gradient; it makes the state.

    Attributes:
        _slots: One variable per weight, z after the first update, or `None`.
        _decayed: One boolean per weight.
        _largest_rate, _weight_sum: Scalar variables.
    """

    beta: float
    weight_decay_rate: float
    step_power: float
    weight_lr_power: float
    _slots: list[keras.Variable | None]
    _decayed: list[bool]
    _largest_rate: keras.Variable
    _weight_sum: keras.Variable
    _room: list[Any] = []

    def _points(self, averages, slots, room=()):
        """y; before the first update x, from which z starts.

        Args:
            room: Tensors that may be written over, as
                `in_place.between` returned them before.
        """

        def between():
            iterates = self._iterates(averages, slots)
            return in_place.between(averages, iterates, 1.0 - self.beta, room)

        return tracing.in_kernel(between, slots)

    def _points_again(self, averages, slots):
        """As `_points`, in the memory that they had in the step before."""
        points = self._points(averages, slots, self._room)
        # Memory, not state: what it holds is not read again.
        vars(self)["_room"] = points if devices.EAGER else []
        return points

    def _iterates(self, averages, slots):
        """z, which starts as a copy of the weights."""
        started = self._weight_sum.value > 0
        iterates = [tracing.read(s) for s in slots]
        return updates.choose(started, lambda: iterates, lambda: averages)

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        kept = moving(gradients, variables, self._slots)
        # A constraint moves weights in calls that are no update too.
        if updates.is_known(self._weight_sum.value > 0) and not any(
            variables[i].constraint is not None for i in kept
        ):
            self._apply_in_place(gradients, variables, kept)
        else:
            # With the update of the inner optimizer: alone, each would pass
            # over the weights.
            update_kernel.as_one_kernel(
                self.inner_optimizer,
                gradients,
                variables,
                lambda: self._apply_selected(gradients, variables, kept),
            )

    def _apply_in_place(self, gradients, variables, kept):
        """The update where Python knows whether there is one."""
        inner = self.inner_optimizer
        moved = [variables[i] for i in kept]
        slots = [self._slots[i] for i in kept]
        averages = [tracing.read(v) for v in moved]
        if not bool(self._weight_sum.value > 0):
            many_tensors.assign_each(self, slots, averages)
        decayed = [
            place
            for place, i in enumerate(kept)
            if self.weight_decay_rate and self._decayed[i]
        ]
        decayed_slots = [slots[place] for place in decayed]
        points = decayed and self._points(
            [averages[place] for place in decayed], decayed_slots
        )
        before = int(inner.iterations)
        rate = float(inner.learning_rate)
        with updates.exchanged(moved, slots):
            updates.apply_gradients(inner, gradients, variables)
        if int(inner.iterations) == before:
            return
        if decayed:
            in_place.add(decayed_slots, points, -rate * self.weight_decay_rate)
        sums = (self._largest_rate, self._weight_sum)
        *new, share = schedule_free(
            np.float64(before + 1),
            np.float64(rate),
            [np.float64(float(v.value)) for v in sums],
            (self.step_power, self.weight_lr_power),
            Numbers,
        )
        for variable, value in zip(sums, new):
            variable.assign(value)
        in_place.move(moved, slots, float(share))

    def _apply_selected(self, gradients, variables, kept):
        """The same as one expression, whether there is an update or not."""
        ops = keras.ops
        inner = self.inner_optimizer
        moved = [variables[i] for i in kept]
        slots = [self._slots[i] for i in kept]
        points = [ops.copy(v) for v in moved]
        dtype = self._weight_sum.dtype
        # Nothing is assigned until all of these exist.
        gathered = updates.barrier(
            [
                *gradients,
                *points,
                *self._iterates(points, slots),
                ops.copy(inner.iterations),
                ops.cast(ops.copy(inner.learning_rate), dtype),
            ]
        )
        all_, count = len(variables), len(kept)
        gradients, gathered = gathered[:all_], gathered[all_:]
        points, iterates = gathered[:count], gathered[count : 2 * count]
        before, rate = gathered[2 * count :]
        for variable, iterate in zip(moved, iterates):
            variable.assign(iterate)
        updates.apply_gradients(inner, gradients, variables)
        updated = ops.convert_to_tensor(inner.iterations) > before
        share = self._share(updated, before, rate)

        def assign_all():
            for i, variable, slot, point, iterate in zip(
                kept, moved, slots, points, iterates
            ):
                new = tracing.read(variable)
                if self.weight_decay_rate and self._decayed[i]:
                    between = point + (1.0 - self.beta) * (iterate - point)
                    decay = ops.cast(rate, new.dtype) * self.weight_decay_rate
                    new = new - decay * between
                new = ops.where(updated, new, iterate)
                average = point + ops.cast(share, new.dtype) * (new - point)
                slot.assign(new)
                variable.assign(ops.where(updated, average, point))

        tracing.in_kernel(assign_all, moved)

    def _share(self, updated, before, rate):
        """c, the weight of the new iterate in the average."""
        sums = (self._largest_rate, self._weight_sum)
        *new, share = schedule_free(
            keras.ops.cast(before, rate.dtype) + 1.0,
            rate,
            [v.value for v in sums],
            (self.step_power, self.weight_lr_power),
        )
        for variable, value in zip(sums, new):
            variable.assign(keras.ops.where(updated, value, variable.value))
        return share
