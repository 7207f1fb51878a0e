"""What every callback has to do with every row of the contract table.

A check is a function of a `Fitted` and a folder; it says "refused" where a
clear error is right, and was seen. All checks of a row share one compiled
model, because compiling is what takes time; each begins at its first state.
"""

import csv
import functools

import contract
import keras
import numpy as np
import pytest

import keras_stab

RATE = 0.01
EMA_MOMENTUM = 0.5
ROUNDING = 1e-6  # a step is of size `RATE`
# As many as give GRAIN across batches and RAPP whole steps.
BATCHES = 6


def inner_optimizer(row):
    return keras.optimizers.AdamW(
        RATE, use_ema=row.averages, ema_momentum=EMA_MOMENTUM
    )


class Failing(keras.callbacks.Callback):
    """Raises at a moment of `fit`, `evaluate` or `predict`."""

    def __init__(self, moment):
        super().__init__()
        setattr(self, moment, self.fail)

    def fail(self, *args, **kwargs):
        raise KeyError("on purpose")


class Fitted:
    """The compiled model of a row, and its first state."""

    def __init__(self, row):
        self.row = row
        # Without dropout, whose seeds Keras does not save.
        self.model = contract.compiled(
            row.build(inner_optimizer(row)), contract.classifier(dropout=False)
        )
        self.optimizer = self.model.optimizer
        self.optimizer.build(self.model.trainable_variables)
        self.first = contract.state(self.model)
        self.x, self.y = contract.data(BATCHES)

    def reset(self):
        variables = [*self.model.variables, *self.optimizer.variables]
        for variable, value in zip(variables, self.first, strict=True):
            variable.assign(value)
        # BackupAndRestore sets it, and Keras 3.15 minds it in later fits too.
        self.model._initial_epoch = None

    def fit(self, callbacks, x=None, **arguments):
        x = self.x if x is None else x
        return contract.fit(
            self.model, x, self.y, callbacks=callbacks, **arguments
        ).history

    def validated(self, callbacks, **arguments):
        held_out = (self.x[: contract.BATCH], self.y[: contract.BATCH])
        return self.fit(callbacks, validation_data=held_out, **arguments)

    def trained(self):
        """The trained weights, in the middle of an epoch too."""
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        return [
            np.array(keras.ops.convert_to_numpy(v))
            for v in self.model.trainable_variables
        ]

    @property
    def rate(self):
        return float(self.optimizer.learning_rate)


@functools.lru_cache(maxsize=1)
def of_row(name):
    return Fitted(contract.row(name))


def check(row, name, folder):
    """Runs the check of one callback; returns the outcome for the page."""
    fitted = of_row(row.name)
    fitted.reset()
    return CHECKS[name](fitted, folder) or "passed"


def same(left, right, within=0.0):
    return all(
        np.allclose(a, b, rtol=0.0, atol=within)
        for a, b in zip(left, right, strict=True)
    )


class Noted(keras.callbacks.Callback):
    """Notes the trained weights at some moments of a run."""

    def __init__(self, fitted, *moments):
        super().__init__()
        self.notes = {moment: [] for moment in moments}
        for moment, notes in self.notes.items():
            setattr(self, moment, self._note(fitted, notes))

    @staticmethod
    def _note(fitted, notes):
        return lambda *_, **__: notes.append(fitted.trained())


# ---- Callbacks of Keras -----------------------------------------------------


def learning_rate_scheduler(fitted, folder):
    """A rate of 0 reaches the step of the method, and so does the next."""
    rates = [0.0, RATE / 2]
    noted = Noted(fitted, "on_epoch_end")
    start = fitted.trained()
    history = fitted.fit(
        [
            keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch]),
            noted,
        ],
        epochs=2,
    )
    assert history["learning_rate"] == pytest.approx(rates)
    assert fitted.rate == pytest.approx(rates[-1])
    still, moved = noted.notes["on_epoch_end"]
    assert same(start, still)
    assert not same(still, moved)


def reduce_lr_on_plateau(fitted, folder):
    history = fitted.fit(
        [
            # Nothing is as much better than the first epoch.
            keras.callbacks.ReduceLROnPlateau(
                monitor="loss", patience=0, factor=0.1, min_delta=1e9
            )
        ],
        epochs=3,
    )
    assert history["learning_rate"] == pytest.approx([RATE, RATE, RATE / 10])
    assert fitted.rate == pytest.approx(RATE / 100)


def model_checkpoint(fitted, folder):
    """The files of all epochs have all numbers of that moment."""
    states = []
    fitted.fit(
        [
            keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: states.append(
                    contract.state(fitted.model)
                )
            ),
        ],
        epochs=2,
    )
    assert len(states) == 2
    for epoch, state in enumerate(states, start=1):
        loaded = keras.models.load_model(folder / f"{epoch}.keras")
        assert type(loaded.optimizer) is type(fitted.optimizer)
        contract.assert_same_bits(state, contract.state(loaded))


def early_stopping(fitted, folder):
    """Stops at the first worse epoch, with the weights of the best one."""
    scores = [0.0, 1.0, 0.5, 0.5, 0.5]
    noted = Noted(fitted, "on_epoch_end")
    history = fitted.fit(
        [
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: logs.update(
                    score=scores[epoch]
                )
            ),
            noted,
            keras.callbacks.EarlyStopping(
                "score", mode="max", patience=1, restore_best_weights=True
            ),
        ],
        epochs=5,
    )
    assert history["score"] == scores[:3]
    _, best, last = noted.notes["on_epoch_end"]
    assert same(best, fitted.trained())
    assert not same(best, last)


class Interruption(Exception):
    """What ends a run here, as a lost machine would."""


def backup_and_restore(fitted, folder):
    """A run that was lost in an epoch ends as the one that was not."""
    whole = fitted.fit([], epochs=2)
    wanted = contract.state(fitted.model)
    fitted.reset()

    def interrupt(epoch, batch):
        if (epoch, batch) == (1, 2):
            raise Interruption

    def backup():
        return keras.callbacks.BackupAndRestore(folder / "backup")

    epochs = []
    with pytest.raises(Interruption):
        fitted.fit(
            [
                backup(),
                keras.callbacks.LambdaCallback(
                    on_epoch_begin=lambda epoch, logs: epochs.append(epoch),
                    on_train_batch_end=lambda batch, logs: interrupt(
                        epochs[-1], batch
                    ),
                ),
            ],
            epochs=2,
        )
    # The model of a new process, as far as the callback knows.
    fitted.reset()
    rest = fitted.fit([backup()], epochs=2)
    assert rest["loss"] == whole["loss"][1:]
    contract.assert_same_bits(wanted, contract.state(fitted.model))


def csv_logger(fitted, folder):
    path = folder / "log.csv"
    history = fitted.fit([keras.callbacks.CSVLogger(path)], epochs=2)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for name in ("loss", "accuracy"):
        assert [float(row[name]) for row in rows] == history[name]


def terminate_on_nan(fitted, folder):
    """The third batch is the last one, of the first epoch."""
    x = fitted.x.copy()
    x[2 * contract.BATCH :] = np.nan
    batches = []
    history = fitted.fit(
        [
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: batches.append(batch)
            ),
        ],
        x=x,
        epochs=2,
    )
    assert batches == [0, 1, 2]
    assert len(history["loss"]) == 1


def lambda_callback(fitted, folder):
    """Every batch and epoch is told, with its logs."""
    told = []
    history = fitted.fit(
        [
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: told.append(
                    logs["loss"]
                ),
                on_epoch_end=lambda epoch, logs: told.append(logs["loss"]),
            )
        ],
        epochs=2,
    )
    assert len(told) == 2 * (BATCHES + 1)
    assert np.all(np.isfinite(told))
    assert told[BATCHES :: BATCHES + 1] == history["loss"]


def swap_ema_weights(fitted, folder):
    """The validation sees the average of all updates; training does not."""
    if not fitted.row.averages:
        with pytest.raises(ValueError, match="use_ema"):
            fitted.validated([keras.callbacks.SwapEMAWeights()])
        inner = keras.optimizers.AdamW(RATE, use_ema=True)
        with pytest.raises(ValueError, match="[Aa]verage"):
            fitted.row.build(inner)
        return "refused"
    average, last, averages = None, fitted.trained(), []
    noted = Noted(fitted, "on_train_batch_end", "on_test_begin", "on_epoch_end")
    fitted.validated([keras.callbacks.SwapEMAWeights(), noted], epochs=2)
    after_batches = noted.notes["on_train_batch_end"]
    for weights in after_batches:
        # Keras swaps by sums on TensorFlow, which round: that is no update.
        if not same(weights, last, within=ROUNDING):
            average = average or weights
            average = [
                EMA_MOMENTUM * a + (1.0 - EMA_MOMENTUM) * w
                for a, w in zip(average, weights)
            ]
        last = weights
        averages.append(average)
    for epoch, last in enumerate((BATCHES - 1, 2 * BATCHES - 1)):
        seen = noted.notes["on_test_begin"][epoch]
        assert same(seen, averages[last], within=ROUNDING)
        assert not same(seen, after_batches[last], within=ROUNDING)
        back = noted.notes["on_epoch_end"][epoch]
        assert same(back, after_batches[last], within=ROUNDING)


# ---- Callbacks of keras_stab ------------------------------------------------


def averaged_weights(fitted, folder):
    callback = keras_stab.AveragedWeights()
    if fitted.row.second_weights != "average":
        with pytest.raises(ValueError, match="holds no WeightAveraging"):
            fitted.fit([callback])
        return "refused"
    second_weights_are_evaluated(fitted, callback)


def swap_slow_weights(fitted, folder):
    callback = keras_stab.SwapSlowWeights()
    if not fitted.row.second_weights:
        with pytest.raises(ValueError, match="keeps no slow weights"):
            fitted.fit([callback])
        return "refused"
    second_weights_are_evaluated(fitted, callback)


def second_weights_are_evaluated(fitted, callback):
    """In the validation, and the trained weights come back bit for bit."""
    noted = Noted(fitted, "on_train_batch_end", "on_test_begin", "on_epoch_end")
    # Five batches are no whole number of steps of any method that has several
    # batches in one: there the second set is another than the trained one.
    fitted.validated([callback, noted], steps_per_epoch=5)
    (evaluated,) = noted.notes["on_test_begin"]
    (after,) = noted.notes["on_epoch_end"]
    trained = noted.notes["on_train_batch_end"][-1]
    assert same(trained, after)
    assert same(trained, evaluated) == (fitted.row.second_weights == "own")
    with fitted.optimizer.swap_weights(fitted.model):
        assert same(evaluated, fitted.trained())


# These tell nothing by themselves, as the contract table makes them: the
# monitor looks at gradients of theirs.
SILENT = ("LARS", "TVLARS", "LAMB", "ScheduleFree")


def stability_monitor(fitted, folder):
    silent = fitted.row.name in SILENT
    probe = (fitted.x[:32], fitted.y[:32]) if silent else None
    monitor = keras_stab.StabilityMonitor(every=3, probe=probe)
    history = fitted.fit([monitor], epochs=2)
    assert [row["step"] for row in monitor.samples] == [3, 6, 9, 12]
    figures = {name for name in history if "/" in name}
    own = type(fitted.optimizer).__name__.lower()
    assert {name.split("/")[0] for name in figures} == {
        "probe" if silent else own
    }
    # The noise is unknown where the rows of a group are, and for one group.
    for name in {n for n in figures if "noise" not in n}:
        assert np.all(np.isfinite(history[name])), name
        assert len(history[name]) == 2


def start_boost_at_loss(fitted, folder):
    def at(level):
        return keras_stab.StartBoostAtLoss(level, window=2)

    with pytest.raises(ValueError, match='start_step="manual"'):
        fitted.fit([at(1e9)])
    if not isinstance(fitted.optimizer, keras_stab.IRE):
        return "refused"
    config = {**fitted.optimizer.get_config(), "start_step": "manual"}
    optimizer = keras_stab.IRE.from_config(config)
    model = contract.compiled(optimizer, contract.classifier(dropout=False))
    for level, started in ((1e-9, False), (1e9, True)):
        contract.fit(model, fitted.x, fitted.y, callbacks=[at(level)])
        assert optimizer.has_started == started
    assert optimizer.diagnostics()["refreshes"] > 0


def recover_from_spikes(fitted, folder):
    """A batch of NaN leaves no trace: not a bit in any variable or log."""
    broken = fitted.x.copy()
    broken[2 * contract.BATCH : 3 * contract.BATCH] = np.nan
    keep = np.delete(
        np.arange(len(broken)), np.s_[2 * contract.BATCH : 3 * contract.BATCH]
    )
    recover = keras_stab.RecoverFromSpikes
    skipped = fitted.fit([recover()], x=broken)
    ended = contract.state(fitted.model)
    fitted.reset()
    wanted = contract.fit(
        fitted.model, broken[keep], fitted.y[keep], callbacks=[recover()]
    ).history
    contract.assert_same_bits(ended, contract.state(fitted.model))
    assert skipped.pop("spikes/count") == [1]
    assert wanted.pop("spikes/count") == [0]
    assert skipped["loss"] == wanted["loss"]
    assert skipped["accuracy"] == wanted["accuracy"]


CHECKS = {
    "LearningRateScheduler": learning_rate_scheduler,
    "ReduceLROnPlateau": reduce_lr_on_plateau,
    "ModelCheckpoint": model_checkpoint,
    "EarlyStopping": early_stopping,
    "BackupAndRestore": backup_and_restore,
    "CSVLogger": csv_logger,
    "TerminateOnNaN": terminate_on_nan,
    "LambdaCallback": lambda_callback,
    "SwapEMAWeights": swap_ema_weights,
    "AveragedWeights": averaged_weights,
    "SwapSlowWeights": swap_slow_weights,
    "StabilityMonitor": stability_monitor,
    "StartBoostAtLoss": start_boost_at_loss,
    "RecoverFromSpikes": recover_from_spikes,
}
