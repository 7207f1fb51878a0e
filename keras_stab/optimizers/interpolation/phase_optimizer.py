"""PhaseOptimizer: a step takes several gradients, one per call of `apply`."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.object_arguments import checked_learning_rate
from keras_stab.optimizers.interpolation.projection import suspended_constraints
from keras_stab.optimizers.interpolation.proximal_choice import checked_proximal
from keras_stab.optimizers.interpolation.proximal_choice import operators_of
from keras_stab.optimizers.lent_weights import LendsWeights
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.state import widest_dtype
from keras_stab.optimizers.updates_together import UpdatesTogether
from keras_stab.types import LearningRate
from keras_stab.types import Tensor


class PhaseOptimizer(LendsWeights, UpdatesTogether):
    """Base of methods that take plain steps with proximal operators.

    A subclass defines `evaluations_per_step` and `move`. The phase of an
    update is its number modulo the evaluations of a step. The learning rate
    is that of phase 0 for the whole step.

    Args:
        learning_rate, proximal, name: As in `RAPP`.
        evaluations: Int, gradients per step, for messages.
        **kwargs: Of every Keras optimizer, without weight decay and EMA.
    """

    together_everywhere = True
    evaluation_name = "anchor"

    def __init__(
        self,
        learning_rate: LearningRate,
        proximal: Any,
        evaluations: int,
        name: str | None,
        **kwargs: Any,
    ) -> None:
        kind = type(self).__name__
        if kwargs.get("weight_decay"):
            raise ValueError(
                f"{kind} starts every step from an anchor, which weight decay "
                "within the step does not reach. Take "
                "proximal=keras_stab.constraints.SquaredL2(weight) instead. "
                f"Received: weight_decay={kwargs['weight_decay']}"
            )
        if kwargs.get("use_ema"):
            raise ValueError(
                f"`use_ema` would average the look-ahead points of {kind}. "
                f"Take WeightAveraging({kind}(...), start_step="
                f"{evaluations - 1}, period={evaluations}) instead. Received: "
                "use_ema=True"
            )
        super().__init__(
            learning_rate=checked_learning_rate(learning_rate),
            name=name,
            **kwargs,
        )
        self.proximal = checked_proximal(proximal)

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        self._operators = operators_of(
            type(self).__name__, self.proximal, variables
        )
        self._step_size = add_state(
            self, "step_size", dtype=widest_dtype(variables)
        )

    def phase(self) -> Tensor:
        """int32 scalar tensor, from 0 to `evaluations_per_step` - 1."""
        count = keras.ops.convert_to_tensor(self.iterations)
        return keras.ops.cast(count, "int32") % self.evaluations_per_step

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        grads = [tracing.densify(g) for g in grads]
        if not grads:
            return
        if not self.built and trainable_variables is not None:
            self.build(trainable_variables)
        if self.built:
            rate = keras.ops.cast(self.learning_rate, self._step_size.dtype)
            self._step_size.assign(
                keras.ops.where(self.phase() == 0, rate, self._step_size.value)
            )
        # What is projected, and when, is a part of the method.
        with suspended_constraints(trainable_variables or self._known()):
            super().apply(grads, trainable_variables)

    def _known(self):
        return keras_internals.built_variables(self) if self.built else []

    def update_step(
        self, gradient: Any, variable: keras.Variable, learning_rate: Any
    ) -> None:
        self.update_steps([gradient], [variable], learning_rate)

    def update_steps(
        self,
        gradients: list[Any],
        variables: list[keras.Variable],
        learning_rate: Any,
    ) -> None:
        """One gradient for each of the variables."""
        indices = [
            keras_internals.variable_index(self, variable)
            for variable in variables
        ]
        self.move(
            indices,
            many_tensors.each_value(gradients),
            many_tensors.each_value(variables),
            variables,
        )

    def move(
        self,
        indices: list[int],
        gradients: list[Any],
        values: list[Tensor],
        variables: list[keras.Variable],
    ) -> None:
        """Assigns the variables and the slots.

        Args:
            indices: Their places among all variables.
            gradients, values: Tensors in full precision.
            variables: What to assign; without paths on TensorFlow.
        """
        raise NotImplementedError

    def proximal_points(
        self, indices: list[int], tensors: list[Tensor]
    ) -> list[Tensor]:
        """The proximal operator of every variable, with the step size."""
        return [
            tensor
            if self._operators[i] is None
            else self._operators[i].proximal(
                tensor, keras.ops.cast(self._step_size.value, tensor.dtype)
            )
            for i, tensor in zip(indices, tensors)
        ]

    def is_free(self, indices: list[int]) -> bool:
        """Whether none of these variables has an operator."""
        return all(self._operators[i] is None for i in indices)

    def remembers(self) -> bool:
        return not self.at_rest()

    def begin_again(self) -> None:
        # The phase follows from the count, by which schedules read their
        # rates: so the step that was cut short counts as a whole one.
        count = self.evaluations_per_step
        steps = -(-self.updates // count)
        keras_internals.set_updates(self, steps * count)

    # ---- Evaluation, saving -----------------------------------------------

    def at_rest(self) -> bool:
        """Whether a step has just ended; read from the device."""
        return self.updates % self.evaluations_per_step == 0

    @property
    def cycle_length(self) -> int:
        return self.evaluations_per_step

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: how far the weights are from the anchor."""
        phase = self.updates % self.evaluations_per_step
        return {"distance": self.distance(), "phase": phase}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        proximal = self.proximal
        serialize = keras.saving.serialize_keras_object
        if isinstance(proximal, dict):
            proximal = {k: serialize(v) for k, v in proximal.items()}
        elif proximal is not None:
            proximal = serialize(proximal)
        config["proximal"] = proximal
        return config

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        custom_objects: dict[str, Any] | None = None,
    ) -> "PhaseOptimizer":
        config = dict(config)
        proximal = config.get("proximal")
        if isinstance(proximal, dict):
            deserialize = keras.saving.deserialize_keras_object
            config["proximal"] = (
                deserialize(proximal, custom_objects)
                if "class_name" in proximal
                else {
                    pattern: deserialize(operator, custom_objects)
                    for pattern, operator in proximal.items()
                }
            )
        return super().from_config(config, custom_objects)
