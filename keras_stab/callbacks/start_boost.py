"""StartBoostAtLoss: IRE starts its boost when the loss is low enough."""

import math
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.backend import tracing
from keras_stab.nesting import nest
from keras_stab.optimizers.flatness.ire import IRE


class StartBoostAtLoss(keras.callbacks.Callback):
    """Starts the boost of `IRE(start_step="manual")` at a training loss.

    Every `window` batches, and at the end of an epoch, the mean loss over the
    batches since the last check is compared with `level`. The part below
    which label smoothing keeps the loss is subtracted first; penalties such
    as those of regularizers are not.

    Args:
        level: Float. Published: 0.1 (ResNets on CIFAR), 0.5 (vision
            transformers on CIFAR), 1.5 (ResNet-50 on ImageNet).
        window: Int, batches between two checks. Defaults to 100.
        classes: Int, the number of classes of an output with label smoothing;
            `None` takes it from the model. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range, the optimizer holds no
            `IRE(start_step="manual")`, or `classes` is needed.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> optimizer = keras_stab.IRE("sgd", start_step="manual")
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.zeros((8, 1))
    >>> start = keras_stab.StartBoostAtLoss(level=100.0)
    >>> history = model.fit(x, y, batch_size=4, callbacks=[start], verbose=0)
    >>> optimizer.has_started
    True
    """

    def __init__(
        self, level: float, window: int = 100, classes: int | None = None
    ) -> None:
        super().__init__()
        self.level = checked_number("level", level)
        self.window = checked_count("window", window, 1)
        self.classes = checked_count("classes", classes, 2, optional=True)

    def on_train_begin(self, logs: dict | None = None) -> None:
        found = (o for o in nest(self.model.optimizer) if isinstance(o, IRE))
        optimizer = next(found, None)
        if optimizer is None or optimizer.start_step != "manual":
            raise ValueError(
                "StartBoostAtLoss needs a model that was compiled with "
                'IRE(..., start_step="manual"). Received: optimizer '
                f"{self.model.optimizer.name!r}"
            )
        self._optimizer = optimizer

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._batches, self._checked, self._sum = 0, 0, 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # With `steps_per_execution` several batches end at a time.
        self._batches = batch + 1
        if self._batches - self._checked >= self.window:
            self._check(logs["loss"])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._batches > self._checked:
            self._check(logs["loss"])

    def _check(self, mean_of_epoch):
        # Keras logs the mean since the epoch began.
        total = float(mean_of_epoch) * self._batches
        mean = (total - self._sum) / (self._batches - self._checked)
        self._checked, self._sum = self._batches, total
        if self._is_started() or not mean - self._floor() <= self.level:
            return
        self._optimizer.start_boost()

    def _is_started(self):
        # On JAX the state is in the variables only when asked for.
        tracing.sync_state(self.model)
        return self._optimizer.has_started

    def _floor(self):
        """The smallest loss that label smoothing allows."""
        floor = 0.0
        for i, head in enumerate(keras_internals.loss_entries(self.model)):
            smoothing = getattr(head.loss, "label_smoothing", 0.0)
            if smoothing:
                weight = 1.0 if head.loss_weights is None else head.loss_weights
                classes = self._classes(head.loss, i)
                floor += weight * smoothing_floor(smoothing, classes)
        return floor

    def _classes(self, loss, index):
        if loss.fn is keras.losses.binary_crossentropy:
            return 2
        if self.classes is not None:
            return self.classes
        outputs = getattr(self.model, "outputs", None)
        if outputs is None:
            raise ValueError(
                "The number of classes is not known from this model. Pass "
                "StartBoostAtLoss(..., classes=...). Received: classes=None, "
                f"model {self.model.name!r}"
            )
        return outputs[index].shape[-1]


def smoothing_floor(smoothing, classes):
    """The entropy of a smoothed label, in nats."""
    rest = smoothing / classes
    own = 1.0 - smoothing + rest
    floor = -(classes - 1) * rest * math.log(rest)
    return floor - own * math.log(own) if own > 0 else floor
