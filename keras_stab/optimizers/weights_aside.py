"""What a method has set aside while others are in the model, in files too."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.batch_norm import moving_statistics
from keras_stab.optimizers.restart import Restarts
from keras_stab.optimizers.state import flat_path

_LENT = "lent"


@dataclasses.dataclass
class Aside:
    """The trained weights, and the statistics that go with them.

    Where `fit` has lent the evaluation weights, their fingerprint tells later
    whether others were put into the model since.
    """

    weights: list
    statistics: list
    lent: int | None = None


class SavesWeightsAside(Restarts):
    """Mixin of optimizers whose files hold what was set aside.

    It stands in front of a Keras optimizer in the list of bases.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._aside: Aside | None = None

    def weights_aside(self, model: keras.Model) -> dict[str, Any]:
        """What is set aside, by the names of its variables; copies."""
        aside = self._aside
        if aside is None:
            return {}
        values = {
            flat_path(variable): keras.ops.copy(value)
            for variable, value in zip(
                self._variables_aside(model, aside.statistics),
                [*aside.weights, *aside.statistics],
            )
            if value is not None
        }
        if aside.lent is not None:
            # As an int32, which every backend and file format has.
            values[_LENT] = keras.ops.convert_to_tensor(
                aside.lent - 2**31, "int32"
            )
        return values

    def set_weights_aside(
        self, model: keras.Model, values: dict[str, Any]
    ) -> None:
        """Sets the values aside, as `weights_aside` returned them."""
        self._aside = None
        if not values:
            return
        found = [
            None
            if flat_path(variable) not in values
            else keras.ops.copy(
                keras.ops.convert_to_tensor(
                    values[flat_path(variable)], variable.dtype
                )
            )
            for variable in self._variables_aside(model, True)
        ]
        count = len(keras_internals.built_variables(self))
        weights, statistics = found[:count], found[count:]
        if any(value is None for value in statistics):
            statistics = []
        lent = int(values[_LENT]) + 2**31 if _LENT in values else None
        self._aside = Aside(weights, statistics, lent)

    def _variables_aside(self, model, statistics):
        return [
            *keras_internals.built_variables(self),
            *(moving_statistics(model) if statistics else []),
        ]

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self._aside is None:
            return
        aside = {
            "weights": [self._aside.weights[i] for i in self._weights()],
            "statistics": self._aside.statistics,
        }
        if self._aside.lent is not None:
            store[_LENT] = np.array(self._aside.lent, "int64")
        for kind, values in aside.items():
            for i, value in enumerate(values):
                if value is not None:
                    value = keras.ops.convert_to_numpy(value)
                    store[f"{kind}_{i}"] = value

    def _weights(self):
        """Places of the weights: a loaded float8 layer has its scales first."""
        variables = keras_internals.built_variables(self)
        return [
            i
            for i, variable in enumerate(variables)
            if not variable.overwrite_with_gradient
        ]

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        self.load_aside(store)

    def load_aside(self, store: Any) -> None:
        """What was set aside when the file was written."""
        self._aside = None
        kinds: dict[str, dict] = {"weights": {}, "statistics": {}}
        for key in store.keys():
            kind, _, index = key.partition("_")
            if kind in kinds:
                kinds[kind][int(index)] = store[key]
        if not self.built or not any(kinds.values()):
            return
        variables = keras_internals.built_variables(self)
        saved, statistics = kinds.values()
        weights = [None] * len(variables)
        for place, i in enumerate(self._weights()):
            if place in saved:
                weights[i] = keras.ops.convert_to_tensor(
                    saved[place], variables[i].dtype
                )
        self._aside = Aside(
            weights=weights,
            statistics=[
                keras.ops.convert_to_tensor(statistics[i])
                for i in sorted(statistics)
            ],
            lent=int(store[_LENT][()]) if _LENT in store.keys() else None,
        )
