"""A radius or a boost that may change over time."""

import keras

from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_number
from keras_stab.numerics.norms import in_full_precision
from keras_stab.object_arguments import deserialized_schedule
from keras_stab.optimizers.wrapper import innermost

Schedule = keras.optimizers.schedules.LearningRateSchedule
# Where the schedules of Keras, and ours, keep their highest rate.
_PEAKS = ("warmup_target", "initial_learning_rate", "learning_rate")


class Strength:
    """A number or a schedule, optionally in proportion to the learning rate.

    Args:
        argument: Name for messages.
        value: Float of at least 0, or a `LearningRateSchedule` (or the config
            of one), which is a function of a count of updates.
        schedule: `"constant"`, or `"learning_rate"`: times the learning rate
            over its highest value.
        reference: That highest value; `None` to look for it in the schedule
            of the learning rate.
    """

    def __init__(self, argument, value, schedule="constant", reference=None):
        if isinstance(value, dict):
            value = deserialized_schedule(argument, value)
        if not isinstance(value, Schedule):
            value = checked_number(argument, value, minimum=0.0)
        self.value = value
        self.schedule = checked_choice(
            f"{argument}_schedule", schedule, ("constant", "learning_rate")
        )
        if reference is not None:
            reference = checked_number(
                "reference_learning_rate", reference, above=0.0
            )
            if schedule == "constant":
                raise ValueError(
                    "`reference_learning_rate` has no effect with "
                    f'{argument}_schedule="constant". Leave it out. Received: '
                    f"reference_learning_rate={reference}"
                )
        self.reference = reference

    @property
    def is_zero(self):
        """Whether it is 0 at all times."""
        return self.value == 0.0

    def check(self, optimizer):
        """Raises a `ValueError` where the highest rate cannot be known."""
        if self.schedule == "learning_rate":
            self._peak(optimizer)

    def at(self, step, optimizer):
        """The strength at a step, as a scalar tensor or a float."""
        value = self.value
        if isinstance(value, Schedule):
            # A tensor, as from Keras; a step that is known is an int here.
            step = keras.ops.convert_to_tensor(step, "int32")
            value = _as_tensor(value(step))
        if self.schedule == "constant":
            return value
        rate = _as_tensor(optimizer.learning_rate)
        if not isinstance(value, float):
            value = keras.ops.cast(value, rate.dtype)
        return value * rate / self._peak(optimizer)

    def config(self):
        """The value, in JSON types."""
        if isinstance(self.value, Schedule):
            return keras.optimizers.schedules.serialize(self.value)
        return self.value

    def _peak(self, optimizer):
        if self.reference is not None:
            return self.reference
        rate = innermost(optimizer).get_config()["learning_rate"]
        # The config holds the present value of a number, perhaps lowered.
        arguments = rate["config"] if isinstance(rate, dict) else {}
        for name in _PEAKS:
            if isinstance(arguments.get(name), float):
                return arguments[name]
        raise ValueError(
            "The highest learning rate is not known: the inner optimizer has "
            "no schedule that gives it. Pass `reference_learning_rate`"
        )


def _as_tensor(value):
    return in_full_precision(keras.ops.convert_to_tensor(value))
