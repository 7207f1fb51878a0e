"""Optimizers that train some weights, to be evaluated with others."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.batch_norm import moving_statistics
from keras_stab.nesting import nest
from keras_stab.nesting import whole_nest
from keras_stab.numerics.ascent import global_norm
from keras_stab.optimizers.lending import lent_weights
from keras_stab.optimizers.restart import Restarts
from keras_stab.optimizers.state import flat_path


@dataclasses.dataclass
class _Aside:
    """The trained weights, and the statistics that go with them."""

    weights: list
    statistics: list


class LendsWeights(Restarts):
    """Mixin of optimizers that keep a second set of weights, for evaluation.

    `swap_in` puts that set into the model and sets the trained weights aside;
    `swap_out` puts them back, bit for bit. What is set aside is saved with
    the optimizer, so a file that is written in between holds both sets, and
    comes back before the next training step.

    It stands in front of a Keras optimizer in the list of bases.
    """

    evaluation_name = "second set of weights"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._aside: _Aside | None = None

    def evaluation_values(self) -> list[Any]:
        """One tensor per built variable; `None` keeps the trained weights."""
        raise NotImplementedError

    def has_evaluation_weights(self) -> bool:
        """Whether there are evaluation weights yet; read from the device."""
        return True

    def nothing_to_lend(self) -> str:
        """The message when there are no evaluation weights yet."""
        return f"There is no {self.evaluation_name} yet"

    def distance(self) -> Any:
        """$|w - e| / |w|$ of the trained and the evaluation weights.

        A float32 scalar; 0 while they are the same.
        """
        values = (
            self.evaluation_values() if self.has_evaluation_weights() else []
        )
        differences = [
            keras.ops.cast(trained, value.dtype) - value
            for trained, value in zip(self._trained() if values else [], values)
            if value is not None
        ]
        if not differences:
            return keras.ops.zeros((), "float32")
        size = keras.ops.maximum(global_norm(self.trained_values()), 1e-30)
        return global_norm(differences) / size

    def _trained(self):
        """The trained weights, one per built variable."""
        variables = keras_internals.built_variables(self)
        aside = self._aside.weights if self.swapped else [None] * len(variables)
        return [
            tracing.read(variable) if value is None else value
            for variable, value in zip(variables, aside)
        ]

    def trained_values(self) -> list[Any]:
        trained = self._trained()
        return [trained[i] for i in self._weights()]

    @property
    def swapped(self) -> bool:
        """Whether the model holds the evaluation weights now."""
        return self._aside is not None

    def swap_in(self, model: keras.Model, statistics: bool = False) -> None:
        """Puts the evaluation weights into the model.

        Args:
            model: The model that the optimizer was built for.
            statistics: Whether to set the batch-norm statistics aside too,
                because they are going to be changed.
        """
        values = self.evaluation_values()
        variables = keras_internals.built_variables(self)
        self._aside = _Aside([None] * len(values), [])
        for i, (variable, value) in enumerate(zip(variables, values)):
            if value is not None:
                value = keras.ops.cast(value, variable.dtype)
                self._aside.weights[i] = updates.exchange(
                    variable, keras.ops.copy(value)
                )
        if statistics:
            self._aside.statistics = [
                updates.exchange(variable, keras.ops.copy(variable.value))
                for variable in moving_statistics(model)
            ]

    def swap_out(self, model: keras.Model) -> None:
        """Puts back what `swap_in`, or the saved state, has set aside."""
        if self._aside is None:
            return
        aside, self._aside = self._aside, None
        pairs = list(zip(keras_internals.built_variables(self), aside.weights))
        if aside.statistics:
            statistics = moving_statistics(model)
            if len(statistics) != len(aside.statistics):
                self._aside = aside
                raise ValueError(
                    "The batch-norm layers of the model are not those that "
                    "the optimizer was saved with. Received: "
                    f"{len(statistics)} statistics, expected "
                    f"{len(aside.statistics)}"
                )
            pairs += zip(statistics, aside.statistics)
        for variable, value in pairs:
            if value is not None:
                updates.exchange(variable, value)

    def forget_trained_weights(self) -> None:
        """Drops what is set aside: the model goes on from what it holds."""
        self._aside = None

    @contextlib.contextmanager
    def swap_weights(self, model: keras.Model) -> Iterator[keras.Model]:
        """Puts the evaluation weights into the model, then the trained ones.

        Inside the `with` block the model holds the weights to evaluate, to
        predict with, or to save. On leaving, even by an exception, the
        trained weights are back bit for bit. Blocks may be nested.

        Args:
            model: The model that the optimizer was built for.

        Yields:
            The model.

        Raises:
            ValueError: If there are no evaluation weights yet.

        Example:

        ```python
        with optimizer.swap_weights(model):
            model.evaluate(x, y)
        ```
        """
        with lent_weights(model, [self]):
            yield model

    # ---- Saving -----------------------------------------------------------

    def weights_aside(self, model: keras.Model) -> dict[str, Any]:
        """What is set aside, by the names of its variables; copies."""
        aside = self._aside
        if aside is None:
            return {}
        return {
            flat_path(variable): keras.ops.copy(value)
            for variable, value in zip(
                self._variables_aside(model, aside.statistics),
                [*aside.weights, *aside.statistics],
            )
            if value is not None
        }

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
        self._aside = _Aside(weights, statistics)

    def _variables_aside(self, model, statistics):
        return [
            *keras_internals.built_variables(self),
            *(moving_statistics(model) if statistics else []),
        ]

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        aside = dict(vars(self._aside)) if self.swapped else {}
        if aside:
            aside["weights"] = [aside["weights"][i] for i in self._weights()]
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
        self._aside = _Aside(
            weights=weights,
            statistics=[
                keras.ops.convert_to_tensor(statistics[i])
                for i in sorted(statistics)
            ],
        )


def lenders(optimizer, kind=LendsWeights):
    """The optimizers of a kind inside an optimizer, the outermost first."""
    return [o for o in whole_nest(optimizer) if isinstance(o, kind)]


def outermost_lenders(optimizer):
    """The methods that decide what is evaluated: the first of every nest."""
    for each in nest(optimizer):
        if isinstance(each, LendsWeights):
            return [each]
    parts = getattr(optimizer, "optimizers", None) or []
    return [method for part in parts for method in outermost_lenders(part)]
