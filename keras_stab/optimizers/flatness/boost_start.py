"""When IRE starts to boost, and when its mask is due for a refresh."""

import keras

from keras_stab import keras_internals
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.optimizers.state import add_state

_NEVER = 2**31 - 1


class BoostStart:
    """The first boosted update: known in advance, or set during training.

    Args:
        optimizer: The optimizer that keeps it as a variable.
        first: Int, or `None` if `set` will give it later.
    """

    def __init__(self, optimizer, first):
        self._first = first
        never = keras.initializers.Constant(_NEVER)
        self._variable = add_state(optimizer, "start_step", initializer=never)

    def set(self, step):
        self._variable.assign(step)

    @property
    def is_set(self):
        """Whether the update is known; read from the device."""
        return self._first is not None or int(self._variable.value) < _NEVER

    def since(self, step):
        """Updates since the start, negative before it."""
        if self._first is None:
            return step - updates.if_known(tracing.read(self._variable))
        return step - self._first

    def count(self, step):
        """The same, but 0 before it."""
        since = self.since(step)
        if isinstance(since, int):
            return max(since, 0)
        return keras.ops.maximum(since, 0)

    def has_come(self, step):
        """Whether this update is boosted: a boolean, or a tensor."""
        return True if self._first == 0 else self.since(step) >= 0

    def is_due(self, step, every, base):
        """Whether a refresh is due at this call of the innermost optimizer."""
        since = self.since(step)
        conditions = [since >= 0, since % every == 0]
        if base.gradient_accumulation_steps:
            is_update = keras_internals.is_update_step(base)
            conditions.append(updates.if_known(is_update))
        return updates.all_hold(conditions)
