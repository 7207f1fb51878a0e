"""IterateMethod: trains some weights, to be evaluated with others."""

import dataclasses

import keras

from keras_stab import keras_internals
from keras_stab.batch_norm import moving_statistics
from keras_stab.gradients import autodiff
from keras_stab.nesting import whole_nest
from keras_stab.optimizers.wrapper import Wrapper


@dataclasses.dataclass
class _Aside:
    """The trained weights, and the statistics that go with them."""

    weights: list
    statistics: list


class IterateMethod(Wrapper):
    """Base of methods that keep a second set of weights, for evaluation.

    `swap_in` puts that set into the model and sets the trained weights aside;
    `swap_out` puts them back, bit for bit. What is set aside is saved with
    the optimizer, so a file that is written in between holds both sets, and
    comes back before the next training step.
    """

    evaluation_name = "evaluation weights"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._aside = None

    def evaluation_slots(self):
        """One variable a built variable, `None` where they are the same."""
        raise NotImplementedError

    def has_evaluation_weights(self):
        """Whether there are any yet; read from the device."""
        raise NotImplementedError

    @property
    def updates(self):
        """Int, the updates made so far; read from the device."""
        iterations = self.iterations
        if isinstance(iterations, keras.Variable):
            iterations = autodiff.read(iterations)
        return int(iterations)

    @property
    def swapped(self):
        """Whether the model holds the evaluation weights now."""
        return self._aside is not None

    def swap_in(self, model, statistics=False):
        """Puts the evaluation weights into the model.

        Args:
            model: The model that the optimizer was built for.
            statistics: Whether batch-norm statistics, which are going to be
                changed, are set aside too.
        """
        slots = self.evaluation_slots()
        variables = keras_internals.built_variables(self)
        self._aside = _Aside([None] * len(slots), [])
        for i, (variable, slot) in enumerate(zip(variables, slots)):
            if slot is not None:
                value = keras.ops.cast(slot.value, variable.dtype)
                self._aside.weights[i] = autodiff.exchange(
                    variable, keras.ops.copy(value)
                )
        if statistics:
            self._aside.statistics = [
                autodiff.exchange(variable, keras.ops.copy(variable.value))
                for variable in moving_statistics(model)
            ]

    def swap_out(self, model):
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
                autodiff.exchange(variable, value)

    # ---- Saving -----------------------------------------------------------

    def save_own_variables(self, store):
        super().save_own_variables(store)
        aside = vars(self._aside) if self.swapped else {}
        for kind, values in aside.items():
            for i, value in enumerate(values):
                if value is not None:
                    value = keras.ops.convert_to_numpy(value)
                    store[f"{kind}_{i}"] = value

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self._aside = None
        kinds = {"weights": {}, "statistics": {}}
        for key in store.keys():
            kind, _, index = key.partition("_")
            if kind in kinds:
                kinds[kind][int(index)] = store[key]
        if not self.built or not kinds["weights"]:
            return
        variables = keras_internals.built_variables(self)
        weights, statistics = kinds.values()
        self._aside = _Aside(
            weights=[
                keras.ops.convert_to_tensor(weights[i], variable.dtype)
                if i in weights
                else None
                for i, variable in enumerate(variables)
            ],
            statistics=[
                keras.ops.convert_to_tensor(statistics[i])
                for i in sorted(statistics)
            ],
        )


def iterate_methods(optimizer, kind=IterateMethod):
    """The methods of a kind inside an optimizer, the outermost first."""
    return [o for o in whole_nest(optimizer) if isinstance(o, kind)]
