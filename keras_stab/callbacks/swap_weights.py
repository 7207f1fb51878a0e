"""Callbacks that let a model be evaluated with other weights."""

import warnings
from typing import Any

import keras

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.backend import tracing
from keras_stab.backend.fingerprint import fingerprint
from keras_stab.batch_norm import moving_statistics
from keras_stab.batch_norm import reestimate_batch_norm
from keras_stab.evaluation import averaging_methods
from keras_stab.trainer.lending import lend_as_fit_does
from keras_stab.trainer.lending import lend_evaluation_weights
from keras_stab.trainer.lending import outermost_lenders
from keras_stab.trainer.lending import return_trained_weights
from keras_stab.trainer.lending import take_back_from_fit


class SwapWeights(keras.callbacks.Callback):
    """Base of callbacks that lend the model an optimizer's other weights.

    Args:
        batch_norm_data, batch_norm_steps, swap_on_epoch: As in
            `AveragedWeights`.
    """

    # `fit` does not lend by itself where such a callback is given.
    lends_weights = True

    def __init__(
        self,
        batch_norm_data: Any = None,
        batch_norm_steps: int | None = None,
        swap_on_epoch: bool = False,
    ):
        super().__init__()
        self.batch_norm_data = batch_norm_data
        self.batch_norm_steps = checked_count(
            "batch_norm_steps", batch_norm_steps, 1, optional=True
        )
        self.swap_on_epoch = checked_boolean("swap_on_epoch", swap_on_epoch)
        self._warned = False
        self._statistics = None
        self._swapped_in_test = False
        # The methods whose weights `fit` has lent before this test.
        self._lent_by_fit: list = []
        # Of the weights that were lent at the end of an epoch.
        self._lent: int | None = None

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._methods()  # raises at once when there are none
        self._lent_by_fit = take_back_from_fit(self.model)
        self._swapped_in_test = self._lend()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._swapped_in_test:
            return_trained_weights(self.model, self._methods())
        self._swapped_in_test = False
        lend_as_fit_does(self.model, self._lent_by_fit)
        self._lent_by_fit = []

    on_predict_begin = on_test_begin
    on_predict_end = on_test_end

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._methods()  # raises at once when there are none

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._lent = None
        return_trained_weights(self.model, self._methods())

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self.swap_on_epoch and self._lend():
            self._lent = self._fingerprint()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        methods = self._methods()
        lent, self._lent = self._lent, None
        if lent is not None and lent != self._fingerprint():
            # An `EarlyStopping` earlier in the list has restored its best
            # weights, which the trained ones must not overwrite.
            for method in methods:
                method.forget_trained_weights()
        return_trained_weights(self.model, methods)

    def _fingerprint(self):
        variables = self.model.trainable_variables
        return fingerprint([tracing.read(v) for v in variables])

    def _methods(self):
        """The methods that lend; at least one."""
        raise NotImplementedError

    def _lend(self):
        """Whether this call has put the evaluation weights in."""
        methods = self._methods()
        if any(method.swapped for method in methods):
            return False
        if not all(method.has_evaluation_weights() for method in methods):
            if not self._warned:
                warnings.warn(
                    f"There is no {methods[0].evaluation_name} yet: the "
                    "trained weights are evaluated until there is",
                    stacklevel=3,
                )
            self._warned = True
            return False
        has_data = self.batch_norm_data is not None
        lend_evaluation_weights(
            self.model, methods, self._refresh if has_data else None
        )
        return True

    def _refresh(self):
        """Validation and the end of the epoch share one pass over the data."""
        variables = moving_statistics(self.model)
        updates = [m.updates for m in self._methods()]
        if self._statistics is None or self._statistics[0] != updates:
            reestimate_batch_norm(
                self.model,
                self.batch_norm_data,
                steps=self.batch_norm_steps,
                verbose=0,
            )
            values = [keras.ops.copy(v.value) for v in variables]
            self._statistics = (updates, values)
            return
        for variable, value in zip(variables, self._statistics[1]):
            variable.assign(keras.ops.copy(value))


class AveragedWeights(SwapWeights):
    """Evaluates with the average, and with batch-norm statistics of its own.

    `fit` uses the average of a `WeightAveraging` without this callback too,
    and leaves it in the model. With the callback `fit` ends with the trained
    weights, and batch-norm statistics can be computed for the average. In
    `fit`, the validation uses the average; in `evaluate` and `predict`,
    when it is given there, the whole call does. The trained weights and
    batch-norm statistics always come back bit for bit, even when a call
    raises. Before the first average the trained weights are used, with a
    warning.

    Args:
        batch_norm_data: Training data, as for `reestimate_batch_norm`, to
            compute the batch-norm statistics of the average. It is read
            more than once, so it cannot be a generator. `None` leaves
            them as they are. Defaults to `None`.
        batch_norm_steps: Int, the most batches of it to use; `None` for all.
            Defaults to `None`.
        swap_on_epoch: Whether callbacks that come after this one in the list
            see the average at the end of an epoch too. `ModelCheckpoint` then
            saves a model that holds the average, with the trained weights in
            the optimizer: they return when training resumes. With `False`
            it saves the trained weights in the model and the average in the
            optimizer. Defaults to `False`.

    Raises:
        ValueError: In `fit`, `evaluate` and `predict`, when the model's
            optimizer holds no `WeightAveraging`.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(keras_stab.WeightAveraging("sgd"), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(
    ...     x, y, validation_data=(x, y), verbose=0,
    ...     callbacks=[keras_stab.AveragedWeights()],
    ... )
    """

    def _methods(self):
        return averaging_methods(self.model)


class SwapSlowWeights(SwapWeights):
    """Evaluates with the slow weights, and batch-norm statistics of theirs.

    `fit` uses them without this callback too, and leaves them in the model;
    with it, `fit` ends with the trained weights. Between two synchronisations a
    model that is trained by `Lookahead`, `RAPP` or an extragradient method
    holds look-ahead points. With this callback the validation in `fit`, and
    `evaluate` and `predict` where it is given there, use the weights that the
    outermost such method calls its iterate: slow weights or anchor, which
    `CEGPlus` also projects. At the end of a cycle these are the weights
    themselves. The trained weights always come back bit for bit, even when a
    call raises.

    Args:
        batch_norm_data, batch_norm_steps, swap_on_epoch: As in
            `AveragedWeights`, with the slow weights in place of the average.

    Raises:
        ValueError: In `fit`, `evaluate` and `predict`, when the model's
            optimizer keeps no second set of weights.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(keras_stab.Lookahead("sgd"), loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(
    ...     x, y, validation_data=(x, y), verbose=0,
    ...     callbacks=[keras_stab.SwapSlowWeights()],
    ... )
    """

    def _methods(self):
        methods = outermost_lenders(self.model.optimizer)
        if not methods:
            raise ValueError(
                "The model's optimizer keeps no slow weights; compile with "
                "one that does, for example keras_stab.Lookahead(optimizer). "
                f"Received: optimizer {type(self.model.optimizer).__name__}"
            )
        return methods
