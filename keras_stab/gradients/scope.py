"""A stateless scope that records what was read and assigned in it."""

import contextlib

import keras

from keras_stab import keras_internals


class RecordingScope(keras.StatelessScope):
    """A stateless scope that knows which variables were assigned.

    Attributes:
        assigned: The assigned variables, by identity.
        draws: How often a seed generator gave a seed.
        strays: Guarded variables that were read outside of `allowing`.
    """

    def __init__(self, mapping):
        super().__init__(collect_losses=True)
        # Tensors that are known to fit; the base class would convert and
        # compare each of them.
        self.state_mapping.update((id(v), value) for v, value in mapping)
        self.assigned = {}
        self.draws = 0
        self.strays = []
        self._guarded = {}
        self._allowed = set()

    @classmethod
    def of(cls, mapping):
        """A scope with the `state_mapping` of another one."""
        scope = cls(())
        scope.state_mapping.update(mapping)
        return scope

    def guard(self, variables):
        """Notes reads of these variables as strays from here on."""
        self._guarded = {id(v): v for v in variables}

    @contextlib.contextmanager
    def allowing(self, variables):
        """Lets guarded variables be read."""
        before = self._allowed
        self._allowed = before | {id(v) for v in variables}
        try:
            yield
        finally:
            self._allowed = before

    def get_current_value(self, variable):
        if id(variable) in self._guarded and id(variable) not in self._allowed:
            self.strays.append(variable)
        return super().get_current_value(variable)

    def add_update(self, update):
        super().add_update(update)
        self.assigned[id(update[0])] = update[0]
        self.draws += keras_internals.is_seed_state(update[0])

    def assigned_value(self, variable):
        if id(variable) in self.assigned:
            return self.get_current_value(variable)
        return None
