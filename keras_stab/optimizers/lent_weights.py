"""Optimizers that train some weights, to be evaluated with others."""

import contextlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_choice
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.backend.fingerprint import fingerprint
from keras_stab.batch_norm import moving_statistics
from keras_stab.nesting import whole_nest
from keras_stab.numerics.ascent import global_norm
from keras_stab.optimizers.weights_aside import Aside
from keras_stab.optimizers.weights_aside import SavesWeightsAside
from keras_stab.trainer.lending import lent_weights


class LendsWeights(SavesWeightsAside):
    """Mixin of optimizers that keep a second set of weights, for evaluation.

    `swap_in` puts that set into the model and sets the trained weights aside;
    `swap_out` puts them back, bit for bit. What is set aside is saved with
    the optimizer, so a file that is written in between holds both sets, and
    comes back before the next training step. `fit` lends the evaluation
    weights at the end of every epoch and of the call, if `evaluate_with` is
    "evaluation", until training goes on.

    It stands in front of a Keras optimizer in the list of bases.
    """

    evaluation_name = "second set of weights"
    # The callback that computes batch-norm statistics of these weights.
    evaluation_callback = "SwapSlowWeights"

    def __init__(
        self, *args: Any, evaluate_with: str = "evaluation", **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.evaluate_with = checked_choice(
            "evaluate_with", evaluate_with, ("evaluation", "trained")
        )

    def evaluation_values(self) -> list[Any]:
        """One tensor per built variable; `None` keeps the trained weights."""
        raise NotImplementedError

    def has_evaluation_weights(self) -> bool:
        """Whether there are evaluation weights yet; read from the device."""
        return True

    @property
    def cycle_length(self) -> int:
        """Updates until the evaluation weights are not those of the start."""
        return 1

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

    @property
    def lent_by_fit(self) -> bool:
        """Whether the evaluation weights are in the model until it trains."""
        return self._aside is not None and self._aside.lent is not None

    def swap_in(
        self,
        model: keras.Model,
        statistics: bool = False,
        by_fit: bool = False,
    ) -> None:
        """Puts the evaluation weights into the model.

        Args:
            model: The model that the optimizer was built for.
            statistics: Whether to set the batch-norm statistics aside too,
                because they are going to be changed.
            by_fit: Whether this lasts until training goes on.
        """
        values = self.evaluation_values()
        variables = keras_internals.built_variables(self)
        self._aside = aside = Aside([None] * len(values), [])
        for i, (variable, value) in enumerate(zip(variables, values)):
            if value is not None:
                value = keras.ops.cast(value, variable.dtype)
                aside.weights[i] = updates.exchange(
                    variable, keras.ops.copy(value)
                )
        if statistics:
            aside.statistics = [
                updates.exchange(variable, keras.ops.copy(variable.value))
                for variable in moving_statistics(model)
            ]
        if by_fit:
            aside.lent = self._fingerprint_of_lent()

    def _fingerprint_of_lent(self):
        """Of what the model holds in place of the trained weights."""
        pairs = zip(keras_internals.built_variables(self), self._aside.weights)
        return fingerprint([tracing.read(v) for v, w in pairs if w is not None])

    def finds_weights_in_place_of_lent(self) -> bool:
        """Whether others were put into the model since `fit` lent these."""
        if self._aside is None or self._aside.lent is None:
            return False
        return (
            self.has_values()
            and self._aside.lent != self._fingerprint_of_lent()
        )

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

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        # Keras calls this while callbacks still see the evaluation weights;
        # methods inside look at the weights that they have trained.
        aside, self._aside = self._aside, None
        if aside is None:
            super().finalize_variable_values(var_list)
            return
        self._exchange(aside)
        try:
            super().finalize_variable_values(var_list)
        finally:
            self._exchange(aside)
            self._aside = aside

    def _exchange(self, aside):
        """The weights of the model for those aside."""
        variables = keras_internals.built_variables(self)
        for i, (variable, value) in enumerate(zip(variables, aside.weights)):
            if value is not None:
                aside.weights[i] = updates.exchange(variable, value)

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

    def restart(self) -> None:
        if self.lent_by_fit:  # what the model holds is what it goes on from
            self.forget_trained_weights()
        super().restart()

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        if self.swapped:
            raise RuntimeError(
                f"The model holds the {self.evaluation_name} for evaluation, "
                "and a step would train it. `fit` and `train_on_batch` put "
                "the trained weights back by themselves; in a training loop "
                "of your own call keras_stab.return_trained_weights(model) "
                "first. "
                f"Received: {self.name!r}"
            )
        super().apply(grads, trainable_variables)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "evaluate_with": self.evaluate_with}


def lenders(optimizer, kind=LendsWeights):
    """The optimizers of a kind inside an optimizer, the outermost first."""
    return [o for o in whole_nest(optimizer) if isinstance(o, kind)]
