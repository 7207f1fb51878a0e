"""Lets Keras's `TerminateOnNaN` see the losses of a game."""

import keras

TerminateOnNaN = keras.callbacks.TerminateOnNaN


class NaNWatch(keras.callbacks.Callback):
    """Tells `TerminateOnNaN`, which looks for `loss`, of the players' losses.

    Args:
        told: List of `TerminateOnNaN`, which are in the same `fit`.
        names: The names of the losses in the log.
    """

    def __init__(self, told, names):
        super().__init__()
        self.told, self.names = told, names

    def on_train_batch_end(self, batch, logs=None):
        losses = [float((logs or {}).get(name, 0.0)) for name in self.names]
        for callback in self.told:
            TerminateOnNaN.on_batch_end(callback, batch, {"loss": sum(losses)})


def with_nan_watch(callbacks, names):
    """The callbacks of a `fit`, and a `NaNWatch` where it is needed."""
    if callbacks is None or isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    callbacks = keras.tree.flatten(callbacks)
    told = [c for c in callbacks if isinstance(c, TerminateOnNaN)]
    return [*callbacks, NaNWatch(told, names)] if told else callbacks
