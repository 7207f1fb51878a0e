"""What becomes of the inner optimizer's state at a synchronisation."""

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.nesting import whole_nest
from keras_stab.optimizers.state import add_state

INNER_STATES = ("keep", "reset", "pullback")


def inner_state_rule(name, optimizer):
    """The rule of that name for an inner optimizer.

    Raises:
        ValueError: If the rule makes no sense for this optimizer.
    """
    rules = {"keep": Keep, "reset": Reset, "pullback": Pullback}
    return rules[name](optimizer)


class Keep:
    """The inner state goes on as if nothing had happened."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def build(self, wrapper):
        """Adds what the rule remembers to the wrapper's variables."""

    def iterations(self):
        """The updates that the wrapper counts, as a variable or tensor."""
        return self.optimizer.iterations

    def apply(self, due, made, slow_step_size):
        """Changes the inner state after an apply.

        Args:
            due: Boolean tensor, whether weights were synchronised.
            made: int32 tensor, real updates of the inner optimizer.
            slow_step_size: Float.
        """


class Reset(Keep):
    """Every slot and the step count start again, as after a new build."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        _refuse_wrappers("reset", optimizer)
        for each in whole_nest(optimizer):
            rate = each.get_config().get("learning_rate")
            if isinstance(rate, dict):
                raise ValueError(
                    'inner_state="reset" sets back the step count, from which '
                    "a schedule reads its rate. Change a float rate from the "
                    "callback keras.callbacks.LearningRateScheduler, or keep "
                    f"the state. Received: {each.name!r} with "
                    f"{rate.get('class_name')}"
                )
        self._updates = None

    def build(self, wrapper):
        slots = _state(self.optimizer)
        self._initial = [_constant("reset", variable) for variable in slots]
        self._slots = slots
        self._updates = add_state(wrapper, "updates")

    def iterations(self):
        if self._updates is None:
            return self.optimizer.iterations
        return self._updates

    def apply(self, due, made, slow_step_size):
        self._updates.assign(self._updates + made)

        def initial():
            return [
                keras.ops.full_like(tracing.read(slot), value)
                for slot, value in zip(self._slots, self._initial)
            ]

        updates.assign_if(due, True, self._slots, initial)


class Pullback(Keep):
    """Momentum is interpolated as the weights are."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        _refuse_wrappers("pullback", optimizer)

    def build(self, wrapper):
        self._momentum = [
            v
            for v in _state(self.optimizer)
            if v.name.endswith("_momentum") or v.name == "momentum"
        ]
        if not self._momentum:
            raise ValueError(
                'inner_state="pullback" interpolates momentum, but the inner '
                "optimizer has none. Give it some, or take "
                f'inner_state="keep". Received: {self.optimizer.name!r} of '
                f"type {type(self.optimizer).__name__}"
            )
        for variable in self._momentum:
            _constant("pullback", variable)
        self._pulled = [
            wrapper.add_variable_from_reference(v, "pulled")
            for v in self._momentum
        ]

    def apply(self, due, made, slow_step_size):
        def between():
            momentum = list(map(tracing.read, self._momentum))
            before = list(map(tracing.read, self._pulled))
            return many_tensors.each_between(before, momentum, slow_step_size)

        updates.assign_if(
            due, True, [*self._momentum, *self._pulled], lambda: 2 * between()
        )


def _refuse_wrappers(name, optimizer):
    """Only the state of a plain optimizer is known well enough."""
    for each in whole_nest(optimizer):
        if hasattr(each, "inner_optimizer") or hasattr(each, "swap_out"):
            raise ValueError(
                f'inner_state="{name}" is for an inner optimizer of Keras '
                "that is not wrapped in another one. Take "
                f'inner_state="keep". Received: {type(each).__name__}'
            )


def _constant(name, variable):
    """The value that all entries of a slot start with."""
    value = np.asarray(tracing.concrete_value(variable), "float64")
    if value.size and np.any(value != value.flat[0]):
        raise ValueError(
            f'inner_state="{name}" needs slots that start as constants. '
            f"{variable.path!r} does not: it starts as a copy of the weights, "
            "or the inner optimizer has been used before. "
            'Take inner_state="keep", or a new inner optimizer'
        )
    return float(value.flat[0]) if value.size else 0.0


def _state(optimizer):
    """Slots and step counts of an optimizer and its parts."""
    rates = {
        id(keras_internals.rate_variable(each))
        for each in whole_nest(optimizer)
    }
    return [v for v in optimizer.variables if id(v) not in rates]
