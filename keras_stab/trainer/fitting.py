"""`fit` evaluates, and ends, with the evaluation weights of the optimizer.

Averages and slow weights are what a method offers to be evaluated. As with
Keras's own `use_ema`, nothing has to be asked for: validation within `fit`,
what callbacks see at the end of an epoch, and the model after `fit` have
them; training goes on from the trained weights.
"""

from typing import Any

import keras

from keras_stab.trainer.lending import lend_as_fit_does
from keras_stab.trainer.lending import outermost_lenders
from keras_stab.trainer.lending import take_back_from_fit

# Where `keras.Model.fit` has its argument `callbacks`.
_PLACE = 5


def fitting(model, following, *args, **kwargs):
    """Calls `fit` with a callback that lends, in front of those given."""
    if not lending_methods(model):
        return following(*args, **kwargs)
    given, each = given_callbacks(args, kwargs)
    in_list = isinstance(given, keras.callbacks.CallbackList)
    # A callback of the user's that swaps weights has rules of its own.
    if any(getattr(callback, "lends_weights", False) for callback in each):
        return following(*args, **kwargs)
    lending = _LendsInFit()
    if in_list:
        lending.set_model(model)
        each.insert(0, lending)
    else:
        callbacks = [lending, *(c for c in each if c is not None)]
        if len(args) > _PLACE:
            args = (*args[:_PLACE], callbacks, *args[_PLACE + 1 :])
        else:
            kwargs["callbacks"] = callbacks
    try:
        history = following(*args, **kwargs)
    finally:
        if in_list:
            each.remove(lending)
    _keep_restored(model)
    return history


def given_callbacks(args, kwargs):
    """The argument `callbacks` of `fit`, and a list of what it holds."""
    given = kwargs.get("callbacks")
    if len(args) > _PLACE:
        given = args[_PLACE]
    if isinstance(given, keras.callbacks.CallbackList):
        return given, given.callbacks
    return given, keras.tree.flatten(given)


def lending_methods(model):
    """The methods whose evaluation weights `fit` lends."""
    methods = outermost_lenders(getattr(model, "optimizer", None))
    return [m for m in methods if m.evaluate_with == "evaluation"]


class _LendsInFit(keras.callbacks.Callback):
    """Lends for validation and from the end of an epoch to the next one."""

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._only_for_test = lend(self.model)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._only_for_test:
            take_back_from_fit(self.model)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        take_back_from_fit(self.model)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        lend(self.model)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        # Where no epoch was left to run, or a callback has trained meanwhile.
        lend(self.model)


def lend(model):
    """Lends the model evaluation weights as `fit` does.

    Returns:
        Whether this call has put evaluation weights into the model.
    """
    methods = [m for m in lending_methods(model) if _has_weights(m)]
    if not methods or any(method.swapped for method in methods):
        return False
    lend_as_fit_does(model, methods)
    return True


def _has_weights(method):
    """Whether it has evaluation weights now that are not the trained ones.

    Nor those that training began with, as slow weights are in a first cycle.
    """
    return (
        method.built
        and method.updates >= method.cycle_length
        and method.has_evaluation_weights()
        and any(value is not None for value in method.evaluation_values())
    )


def _keep_restored(model):
    """Forgets the trained weights if others were put in when training ended.

    `EarlyStopping` restores its best weights then: evaluation weights of an
    earlier epoch, from which training goes on.
    """
    for method in lending_methods(model):
        if method.finds_weights_in_place_of_lent():
            method.forget_trained_weights()
