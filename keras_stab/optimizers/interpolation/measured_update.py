"""MeasuredUpdate: uses what an inner optimizer would do, in another way."""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.backend import devices
from keras_stab.backend import look_ahead
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import update_kernel
from keras_stab.backend import updates
from keras_stab.optimizers.interpolation.projection import suspended_constraints
from keras_stab.optimizers.lent_weights import LendsWeights
from keras_stab.optimizers.nest_checks import always_updates
from keras_stab.optimizers.nest_checks import refuse_accumulating_parts
from keras_stab.optimizers.nest_checks import refuse_averages_inside
from keras_stab.optimizers.nest_checks import refuse_several_evaluations
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.state import moving
from keras_stab.optimizers.wrapper import Wrapper
from keras_stab.types import Tensor


class MeasuredUpdate(LendsWeights, Wrapper):
    """Base of the extragradient family around any optimizer.

    The update u is the difference of the weights that the inner optimizer
    makes, without constraints. A subclass names its one slot per variable,
    `slot_name`, and defines `move`, which says where weights and slots go.
    """

    slot_name = "anchor"
    evaluation_name = "anchor"
    # A function as `move`, but of variables, which it assigns, and for the
    # case of `_is_free`: of the weights after the inner update, what they were
    # before (tensors that may be written over), the slots, and whether this is
    # the first update.
    _step_freely: Callable[..., None] | None = None
    # Whether TensorFlow should compile that with the inner update: not where
    # weights and slots are made of what both were, which XLA copies first.
    _pays_in_kernel = False

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "sgd",
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        kind, inner = type(self).__name__, self.inner_optimizer
        refuse_averages_inside(kind, inner)
        refuse_accumulating_parts(kind, inner)
        refuse_several_evaluations(kind, inner)

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        self._phase = add_state(self, "phase")
        self._slots = self.add_optimizer_variables(variables, self.slot_name)
        self._room: list[Tensor] = []

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        if self._is_free(gradients, variables):
            self._apply_freely(gradients, variables)
            return
        count = len(variables)
        gathered = updates.barrier(
            [
                *gradients,
                *map(tracing.snapshot, variables),
                keras.ops.copy(self._phase.value),
                self.completed_updates(),
            ]
        )
        gradients, before = gathered[:count], gathered[count : 2 * count]
        phase, completed = gathered[2 * count :]
        with suspended_constraints(variables) as constraints:
            self.inner_apply(gradients, variables, phase)
        updated = self.completed_updates() > completed
        kept = moving(gradients, variables, self._slots)
        slots = [self._slots[i] for i in kept]
        moved = [variables[i] for i in kept]

        def project(values):
            pairs = zip((constraints[i] for i in kept), values)
            return [v if c is None else c(v) for c, v in pairs]

        new_slots, values = self.move(
            phase,
            updated,
            list(map(tracing.read, slots)),
            [before[i] for i in kept],
            list(map(tracing.read, moved)),
            project,
        )
        many_tensors.assign_each(self, slots, new_slots)
        many_tensors.assign_each(self, moved, values)
        self._phase.assign(self.next_phase(phase, updated))

    def _is_free(self, gradients, variables):
        """Whether the quick form of the step serves.

        All weights move, without projection, and the inner optimizer cannot
        skip an update.
        """
        return (
            self._step_freely is not None
            and always_updates(self.inner_optimizer)
            and look_ahead.is_possible()
            and all(
                gradient is not None
                and variable.constraint is None
                and slot is not None
                and slot.dtype == variable.dtype
                for gradient, variable, slot in zip(
                    gradients, variables, self._slots
                )
            )
        )

    def _apply_freely(self, gradients, variables):
        inner = self.inner_optimizer
        gradients = updates.barrier(gradients)

        def step():
            before = look_ahead.remember(variables, self._room)
            # Memory, not state: what it holds is not read again.
            vars(self)["_room"] = before if devices.EAGER else []
            updates.apply_gradients(inner, gradients, variables)
            first = keras.ops.convert_to_tensor(self._phase.value) == 0
            self._step_freely(variables, before, self._slots, first)
            self._phase.assign(1)

        if self._pays_in_kernel:
            update_kernel.as_one_kernel(inner, gradients, variables, step)
        else:
            step()

    def inner_apply(
        self,
        gradients: list[Any],
        variables: list[keras.Variable],
        phase: Tensor,
    ) -> None:
        """The update of the inner optimizer, without constraints."""
        del phase
        updates.apply_gradients(self.inner_optimizer, gradients, variables)

    def move(
        self,
        phase: Tensor,
        updated: Tensor,
        slots: list[Tensor],
        before: list[Tensor],
        after: list[Tensor],
        project: Callable[[list[Tensor]], list[Tensor]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Where slots and weights go.

        Args:
            phase: int32 scalar tensor, 0 at first.
            updated: Boolean tensor, whether the inner optimizer did anything;
                otherwise slots and weights must stay.
            slots: Tensors.
            before, after: Weights around the inner update, tensors.
            project: Function that applies the constraints to a list.

        Returns:
            New slots, new weights.
        """
        raise NotImplementedError

    def next_phase(self, phase: Tensor, updated: Tensor) -> Tensor:
        """The phase after an update; 1 from the first real one on."""
        started = keras.ops.logical_or(phase > 0, updated)
        return keras.ops.cast(started, "int32")

    def remembers(self) -> bool:
        return int(tracing.read(self._phase)) > 0

    def begin_again(self) -> None:
        self._phase.assign(0)

    def evaluation_values(self) -> list[Tensor | None]:
        if not self.built:
            return []
        if not self.remembers():
            return [None] * len(self._slots)
        return [None if s is None else s.value for s in self._slots]

    @property
    def cycle_length(self) -> int:
        return self.evaluations_per_step

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: how far the weights are from the anchor."""
        phase = tracing.read(self._phase) if self.built else 0
        return {"distance": self.distance(), "phase": phase}
