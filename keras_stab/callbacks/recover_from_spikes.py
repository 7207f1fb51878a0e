"""RecoverFromSpikes: updates of spikes are not made, or are taken back."""

import os
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_choices
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.backend import tracing
from keras_stab.callbacks.rollback import Rollback
from keras_stab.callbacks.snapshots import Snapshots
from keras_stab.callbacks.spike_figures import are_too_many
from keras_stab.callbacks.spike_figures import counts_of
from keras_stab.callbacks.spike_figures import figures_of
from keras_stab.diagnostics.monitoring.outputs import CsvRows
from keras_stab.diagnostics.monitoring.outputs import TensorBoardScalars
from keras_stab.gradients.spike_watch import MONITORS
from keras_stab.gradients.spike_watch import SpikeRule
from keras_stab.gradients.spike_watch import SpikeWatch
from keras_stab.gradients.spike_watch import watch_of
from keras_stab.gradients.watched_step import rates_of
from keras_stab.numerics import unusual
from keras_stab.trainer import watching


class RecoverFromSpikes(keras.callbacks.Callback):
    r"""Leaves out the update of a spike, or goes back to before it.

    One broken batch can cost a run: its gradient throws the weights far off,
    or fills them and the moments of the optimizer with NaN. With this callback
    the train step itself compares the loss $L$ and the logarithm of the
    gradient norm $\log |g|$ with those of the last `window` steps. With their
    median $m$, their lower quartile $q$ and the spread
    $s = \max(1.4826 (m - q), s_0)$, the step is a spike if one of the two is
    above

    $$
    m + \tau s
    $$

    for the `threshold` $\tau$, or is not finite.

    - `action="skip"`: the update of a spike is not made. Weights, optimizer,
      batch-norm statistics, seeds and metrics stay as they were, bit for bit,
      as if the batch had not come. Nothing is read from the device for that:
      the decision is a part of the compiled step.
    - `action="rollback"`: the update is made, and every `check_every` steps
      one number is read from the device. If it tells of a spike, training goes
      on, with the batches that follow, from the last snapshot of all of these
      that was followed by `snapshot_every` steps without one. For a loss that
      climbs before it is a spike, when the harm is in the weights already.

    $s_0$ is $0.05 |m|$ for the loss and $0.05$ for the logarithm: a
    loss that is the same in every step has no spread. All finite values go into
    the window, those of spikes too, so that a level that is new for good is
    usual after half a window. Until the window is full only what is not finite
    is a spike.

    It works with every optimizer, and with methods of this library that choose
    the gradient (`GRAIN`, `SAM`): the gradient that is looked at is the one
    that the optimizer is given. With gradient accumulation each batch is
    looked at by itself. A `LossScaleOptimizer` goes on to skip steps by
    itself: gradients that are not finite under one are no spike; a loss that
    is not finite is.

    Args:
        action: `"skip"` or `"rollback"`. Defaults to `"skip"`.
        threshold: Float above 0, $\tau$. Defaults to `10.0`.
        window: Int from 8 to 1024, steps. Defaults to `128`.
        monitor: `"loss"`, `"gradient_norm"` or a list of both: what is compared
            with its limit. Both must be finite in any case. Defaults to
            `("loss", "gradient_norm")`.
        rate_factor: Float in (0, 1], by which the learning rates are
            multiplied in the steps of a cool-down. What callbacks see of the
            learning rate stays. Defaults to `1.0`.
        cool_down: Int, steps after a spike, or a rollback, that are a
            cool-down if `rate_factor` is not 1. Defaults to `100`.
        snapshot_every: Int, steps between two snapshots of a rollback. The
            first one is taken before the first step. Defaults to `100`.
        check_every: Int, steps after which a rollback looks for spikes; it
            does so at the end of an epoch too. Defaults to `10`.
        keep_on: `"host"` or `"device"`, where snapshots are kept: three at
            most, each as large as weights and optimizer state together.
            Defaults to `"host"`.
        max_recoveries: Int: how many spikes may be skipped, or rollbacks be
            made, in the life of the model. With one more the training stops,
            with a warning: after a rollback at once, with the snapshot whose
            window had the lowest median loss; otherwise at the end of the
            epoch. Defaults to `None`, no limit.
        csv: Path of a file that gets one row per epoch. Defaults to `None`.
        tensorboard: Folder for TensorBoard, or the
            `keras.callbacks.TensorBoard` of the same run; needs the package
            `tensorboard`. Defaults to `None`.

    The logs of an epoch, and with them the history that `fit` returns, hold
    `spikes/count`, the spikes of the epoch, `spikes/rollbacks` with
    `action="rollback"`, and `spikes/loss_limit` and
    `spikes/gradient_norm_limit` at its end (NaN until the window is full). Put
    the callback before others that read the logs or save the model, such as
    `CSVLogger` and `ModelCheckpoint`.

    The window, the counts and the snapshots are saved with the weights of the
    model (`save_weights`, `ModelCheckpoint`, `BackupAndRestore`), and training
    goes on from there bit for bit. To load them by hand, call
    `callback.set_model(model)` on the compiled model before
    `model.load_weights`.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if `rate_factor`
            is not 1 and the learning rate is a schedule, if the model's own
            `metrics` lacks its loss tracker, or under `tf.distribute` and
            `torch.distributed`, where one replica would decide for all.
        RuntimeError: In `fit`, if the model has a `train_step` that takes its
            gradients by itself.
        ImportError: If `tensorboard` is asked for and not installed.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("adam", loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> broken = keras.ops.concatenate([x[:4], x[4:] * float("nan")])
    >>> recover = keras_stab.RecoverFromSpikes()
    >>> history = model.fit(
    ...     broken, y, batch_size=4, shuffle=False, verbose=0,
    ...     callbacks=[recover],
    ... )
    >>> history.history["spikes/count"]
    [1]

    Departures from the paper:
        Chowdhery et al. found spikes by eye and went back by hand, to a
        checkpoint 100 steps before, leaving out 200 to 500 batches. Here a rule
        finds them, and only the batches since the snapshot are left out.

    Cost:
        Per step one pass over the gradients for their norm, and the sorting of
        two columns of `window` numbers. On an accelerator with PyTorch also a
        copy of weights and optimizer state, since Python would have to wait for
        the decision. A snapshot copies these to where it is kept.

    References:
        - Chowdhery et al., 2022, "PaLM: Scaling Language Modeling with
          Pathways", section 5.1, arXiv:2204.02311
    """

    # For `fit`, which watches from before it makes the train function.
    watches_training = True

    def __init__(
        self,
        action: str = "skip",
        threshold: float = 10.0,
        window: int = 128,
        monitor: str | Sequence[str] = MONITORS,
        rate_factor: float = 1.0,
        cool_down: int = 100,
        snapshot_every: int = 100,
        check_every: int = 10,
        keep_on: str = "host",
        max_recoveries: int | None = None,
        csv: str | os.PathLike | None = None,
        tensorboard: str
        | os.PathLike
        | keras.callbacks.TensorBoard
        | None = None,
    ) -> None:
        super().__init__()
        self.action = checked_choice("action", action, ("skip", "rollback"))
        self.threshold = checked_number("threshold", threshold, above=0.0)
        self.window = checked_count("window", window, 8, 1024)
        self.monitor = checked_choices(
            "monitor",
            (monitor,) if isinstance(monitor, str) else monitor,
            MONITORS,
        )
        self.rate_factor = checked_number(
            "rate_factor", rate_factor, above=0.0, maximum=1.0
        )
        self.cool_down = checked_count("cool_down", cool_down, 1)
        self.snapshot_every = checked_count("snapshot_every", snapshot_every, 1)
        self.check_every = checked_count("check_every", check_every, 1)
        self.keep_on = checked_choice("keep_on", keep_on, ("host", "device"))
        self.max_recoveries = checked_count(
            "max_recoveries", max_recoveries, 0, optional=True
        )
        self._outputs: list[CsvRows | TensorBoardScalars] = []
        if csv is not None:
            self._outputs.append(CsvRows(csv))
        if tensorboard is not None:
            self._outputs.append(TensorBoardScalars(tensorboard))
        self._rule = SpikeRule(
            self.monitor,
            self.threshold,
            self.action == "skip",
            self.rate_factor,
            self.cool_down,
        )
        self._watch: SpikeWatch | None = None
        self._rollback: Rollback | None = None
        self._in_epoch = False

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if not getattr(model, "compiled", False):
            return
        watch = watch_of(model, self.window)
        if watch is self._watch:
            return
        self._watch, watch.companion = watch, None
        if self.action == "rollback":
            watch.companion = Snapshots(model, watch, self.keep_on == "host")
            self._rollback = Rollback(model, watch, watch.companion, self)

    def begin_watching(self) -> None:
        """Lets the train steps of the model be watched; `fit` calls this."""
        rates = rates_of(self.model.optimizer)
        if self.rate_factor != 1.0 and any(rate is None for rate in rates):
            raise ValueError(
                "`rate_factor` needs a learning rate that is a number, and the "
                "optimizer has a schedule: give it a number and `fit` the "
                "callback keras.callbacks.LearningRateScheduler, or leave "
                f"rate_factor=1.0. Received: rate_factor={self.rate_factor}"
            )
        watching.begin_watching(self.model, self._watch, self._rule)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.begin_watching()
        if self.model.train_function is None:  # not within our own `fit`
            self.model.make_train_function()
        if self._rollback is not None:
            self._rollback.begin()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        watching.stop_watching(self.model)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._before, self._in_epoch = counts_of(self._watch), True
        if self._rollback is not None:
            self._rollback.begin_epoch(epoch)

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if batch:
            self._check_was_asked()
        if self._rollback is not None:
            self._rollback.before_step(int(self._before[unusual.STEPS]) + batch)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._rollback is not None and self._in_epoch:
            self._rollback.after_steps()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._in_epoch = False
        self._check_was_asked()
        tracing.sync_state(self.model)
        if self._rollback is not None:
            self._rollback.after_steps()
            for name, value in self._rollback.logs.items():
                if logs is not None and name in logs:
                    logs[name] = value
        watch, before = self._watch, self._before
        rolls_back = self._rollback is not None
        figures = figures_of(watch, before, self.threshold, rolls_back)
        if logs is not None:
            logs.update(figures)
        step = int(counts_of(watch)[unusual.STEPS])
        for output in self._outputs:
            output.write({"step": step, "epoch": epoch, **figures})
        if not rolls_back and are_too_many(watch, before, self.max_recoveries):
            self.model.stop_training = True

    def _check_was_asked(self):
        if not self._rule.was_asked:
            raise RuntimeError(
                "No step was watched for spikes: the `train_step` of the model "
                "takes its gradients by itself. End it with "
                "`return super().train_step(...)`, and call "
                "`keras_stab.install()` if you called `uninstall()`. Received: "
                f"model {self.model.name!r} of type "
                f"{type(self.model).__name__}"
            )
