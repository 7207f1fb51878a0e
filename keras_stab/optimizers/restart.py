"""Restarts: methods begin again at weights that were put into the model."""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.backend import tracing
from keras_stab.backend.fingerprint import fingerprint
from keras_stab.nesting import whole_nest

_KEY = "left_behind"


class Restarts(keras.optimizers.Optimizer):
    """Mixin of methods that remember a point of their own besides the weights.

    An iterate, an anchor, slow weights, an average or gradients that wait for
    others belong to the weights that the method has trained. If others are
    put into the model between two calls of `fit` (`load_weights`,
    `set_weights`, or `EarlyStopping(restore_best_weights=True)`), the next
    call begins again from these, with a warning: at the end of `fit` a
    fingerprint of the weights is taken, and it is compared once, when
    training next begins. It is saved with the optimizer; if it is missing,
    methods go on as if the weights were theirs.

    It stands in front of a Keras optimizer in the list of bases. A subclass
    defines `remembers` and `begin_again`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Updates made, and fingerprint of the weights, at the end of `fit`.
        self._left_behind: tuple[int, int] | None = None

    def remembers(self) -> bool:
        """Whether there is a point of its own now; read from the device."""
        raise NotImplementedError

    def begin_again(self) -> None:
        """Forgets that point: the next update takes the weights for it."""
        raise NotImplementedError

    @property
    def updates(self) -> int:
        """The updates made so far; read from the device."""
        iterations = self.iterations
        if isinstance(iterations, keras.Variable):
            iterations = tracing.read(iterations)
        return int(iterations)

    def restart(self) -> None:
        """Begins again at the weights that the model holds now.

        Iterate, anchor, slow weights or average are taken from these at the
        next update, and gradients that wait for others are dropped; methods
        inside do the same. Moments, step count and learning rate stay; a
        cycle that was cut short counts as whole. At the start of `fit` this
        happens by itself, with a warning, if other weights were put into the
        model since the last call of `fit`. In a training loop of your own
        call it after `load_weights`.

        Raises:
            ValueError: If the model holds the evaluation weights.
        """
        if getattr(self, "swapped", False):
            raise ValueError(
                "The model holds the evaluation weights: call `restart` "
                "outside of `swap_weights` and `averaged_weights`. Received: "
                f"{self.name!r}"
            )
        self._left_behind = None
        if self.built:
            self.begin_again()
        restart_inside(self)

    def trained_values(self) -> list[Any]:
        """The weights that are trained, even while others are lent."""
        return [
            tracing.read(v)
            for v in keras_internals.built_variables(self)
            if not v.overwrite_with_gradient
        ]

    def finds_other_weights(self) -> bool:
        """Whether other weights were put into the model since the last `fit`.

        True once at most; `fit` asks before it trains.
        """
        left, self._left_behind = self._left_behind, None
        # After updates outside of `fit` nothing is known.
        if left is None or not self.built or left[0] != self.updates:
            return False
        return self.remembers() and left[1] != fingerprint(
            self.trained_values()
        )

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        super().finalize_variable_values(var_list)
        self._left_behind = None
        if self.has_values() and self.remembers():
            values = self.trained_values()
            self._left_behind = (self.updates, fingerprint(values))

    def has_values(self) -> bool:
        """Whether there is anything to read; not after a step raised on JAX."""
        variables = keras_internals.built_variables(self) if self.built else []
        return bool(variables) and all(
            map(keras_internals.has_value, [*variables, *self.variables])
        )

    def set_weights(self, weights: Iterable[Any]) -> None:
        super().set_weights(weights)
        for each in whole_nest(self):
            if isinstance(each, Restarts):
                each.forget_left_behind()

    # ---- Saving -----------------------------------------------------------

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self._left_behind is not None:
            store[_KEY] = np.array(self._left_behind, "int64")

    def load_own_variables(self, store: Any) -> None:
        # Keras counts the entries, and takes them for variables.
        own = {key: store[key] for key in store.keys() if key.isdigit()}
        super().load_own_variables(own)
        self._left_behind = None
        if self.built and _KEY in store.keys():
            updates, number = store[_KEY]
            self._left_behind = (int(updates), int(number))

    def forget_left_behind(self) -> None:
        """Skips the comparison at the next start, after a state was loaded."""
        self._left_behind = None


def restart_inside(optimizer):
    """Lets the methods inside an optimizer begin again."""
    for each in whole_nest(getattr(optimizer, "inner_optimizer", None)):
        if isinstance(each, Restarts):
            each.restart()
