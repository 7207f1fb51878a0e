"""StabilityMonitor: what the methods report, alongside the loss."""

import os
from typing import Any

import keras
import numpy as np

from keras_stab.arguments import checked_count
from keras_stab.backend import tracing
from keras_stab.diagnostics.monitoring.gradient_probe import GradientProbe
from keras_stab.diagnostics.monitoring.method_figures import method_figures
from keras_stab.diagnostics.monitoring.method_figures import reporting
from keras_stab.diagnostics.monitoring.outputs import CsvRows
from keras_stab.diagnostics.monitoring.outputs import TensorBoardScalars
from keras_stab.numerics.min_norm import MAX_GROUPS

_NOISE = ("gradient_noise", "gradient_norm_squared")


class StabilityMonitor(keras.callbacks.Callback):
    r"""Logs what the methods in the optimizer report, and how groups agree.

    Every optimizer in the nest that has a method `stability_metrics()` or
    `diagnostics()` is asked: GRAIN for its weights and their entropy, conflict
    rate, $|d| / |\bar g|$, solver gap; SAM for the rise of the loss; IRE for
    its flat fraction and the churn of its mask; LARS, LAMB and TVLARS made
    with `track_trust_ratios=True` for the ratio of every layer;
    `WeightAveraging` for the distance of the weights from their average;
    Lookahead, RAPP and the extragradient family for their phase and the
    distance from their anchor. An optimizer of your own takes part if it has
    a method `stability_metrics()` that returns a dict of numbers, scalar
    tensors or variables, or lists and dicts of them; it is called only when a
    sample is taken.

    `probe` gives the conflict rate and the gradient noise scale of any
    optimizer, even a plain one: the gradients of groups of these rows are
    computed alongside training, which stays the same to the last bit.

    The gradient noise scale $\operatorname{tr} \Sigma / |G|^2$ (in rows, for
    the mean gradient $G$ and the covariance $\Sigma$ of row gradients) is the
    ratio of two averages over the samples of an epoch, each of which is
    unbiased; it is NaN where the estimate of $|G|^2$ is 0 or less.

    Nothing is read from the device between samples.

    Args:
        every: Int, batches between two samples; or `"epoch"` for one sample
            at the end of each epoch. The logs of an epoch hold means over its
            samples. Defaults to `"epoch"`.
        probe: Data as for `fit`: arrays `(x, y)` or `(x, y, sample_weight)`,
            cut into batches, or batches. All of it is used for each sample,
            in training mode. `None` for none. Defaults to `None`.
        groups: Int from 2 to 64, groups per probe batch. Defaults to 4.
        batch_size: Int, rows per probe batch cut from arrays. Defaults to 32.
        csv: Path of a file that gets one row per sample. Defaults to `None`.
        tensorboard: Folder for TensorBoard, or the
            `keras.callbacks.TensorBoard` of the same run; needs the package
            `tensorboard`. Defaults to `None`.

    Attributes:
        samples: List of dicts, one per sample: `step` (batches so far; a
            resumed run counts on from `iterations` of its optimizer), `epoch`
            and all figures.

    The logs of an epoch, and with them the history that `fit` returns, hold
    every figure that is one number. Put the monitor before callbacks that
    read them, such as `CSVLogger`, `TensorBoard` or `EarlyStopping`. Figures
    of single layers or groups are in `samples`, CSV and TensorBoard.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if there is no
            probe and no optimizer reports a figure (LARS without
            `track_trust_ratios=True` does not), or the probe is empty.
        ImportError: If `tensorboard` is asked for and not installed.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile("sgd", loss="mse")
    >>> x, y = keras.random.normal((16, 3), seed=1), keras.ops.ones((16, 1))
    >>> monitor = keras_stab.StabilityMonitor(probe=(x, y), batch_size=16)
    >>> history = model.fit(x, y, callbacks=[monitor], verbose=0)
    >>> 0.0 <= history.history["probe/conflict_rate"][0] <= 1.0
    True

    Departures from the paper:
        McCandlish et al. average over steps with a decay and compare two
        batch sizes; here the groups of a batch are compared with the batch.

    Cost:
        Per sample: reading some numbers; with a probe, the gradients of its
        groups, which are compiled once.

    References:
        - McCandlish, Kaplan, Amodei, OpenAI Dota Team, 2018, "An Empirical
          Model of Large-Batch Training", arXiv:1812.06162
    """

    # Batches are counted when they begin: for a callback that is called at
    # their end Keras reads the loss from the device each time.

    def __init__(
        self,
        every: int | str = "epoch",
        probe: Any = None,
        groups: int = 4,
        batch_size: int = 32,
        csv: str | os.PathLike | None = None,
        tensorboard: str
        | os.PathLike
        | keras.callbacks.TensorBoard
        | None = None,
    ) -> None:
        super().__init__()
        self.every = _checked_every(every)
        self.probe = probe
        self.groups = checked_count("groups", groups, 2, MAX_GROUPS)
        self.batch_size = checked_count("batch_size", batch_size, 1)
        self.samples: list[dict[str, Any]] = []
        self._probe: GradientProbe | None = None
        self._outputs: list[CsvRows | TensorBoardScalars] = []
        if csv is not None:
            self._outputs.append(CsvRows(csv))
        if tensorboard is not None:
            self._outputs.append(TensorBoardScalars(tensorboard))

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self.probe is None and not reporting(self.model.optimizer):
            raise ValueError(
                "The optimizer reports no figures: pass "
                "StabilityMonitor(probe=(x, y)) to look at the gradients of "
                f"some rows. Received: optimizer {self.model.optimizer.name!r}"
            )
        # A resumed run counts on.
        self._step = int(self.model.optimizer.iterations)
        # Here, so that wrong data are known before an epoch is trained.
        if self.probe is not None:
            self._probe = GradientProbe(
                self.model, self.probe, self.groups, self.batch_size
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch, self._begun = epoch, self._step
        self._last = self._step
        self._first_sample = len(self.samples)

    def on_train_batch_begin(
        self, batch: int, logs: dict | None = None
    ) -> None:
        self._step = self._begun + batch
        self._sample_if_due()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._step += self.model.steps_per_execution
        if self.params.get("steps") is not None:
            self._step = min(self._step, self._begun + self.params["steps"])
        self._sample_if_due()
        if len(self.samples) == self._first_sample:
            self._take_sample()
        if logs is not None:
            logs.update(_means(self.samples[self._first_sample :]))

    def _sample_if_due(self):
        if self.every == "epoch":
            return
        # With `steps_per_execution` several batches pass at a time.
        if self._step // self.every > self._last // self.every:
            self._take_sample()
        self._last = self._step

    def _take_sample(self):
        tracing.sync_state(self.model)
        figures = method_figures(self.model.optimizer)
        if self._probe is not None:
            measures = self._probe.measure().items()
            figures.update((f"probe/{key}", value) for key, value in measures)
        if not figures:
            raise ValueError(
                "The optimizer reports no figures: make it with "
                "track_trust_ratios=True, or pass "
                "StabilityMonitor(probe=(x, y)). Received: optimizer "
                f"{self.model.optimizer.name!r}"
            )
        figures.update(_noise_scales(figures))
        row = {"step": self._step, "epoch": self._epoch, **figures}
        self.samples.append(row)
        for output in self._outputs:
            output.write(row)


def _checked_every(every):
    if isinstance(every, str) and every == "epoch":
        return every
    try:
        return checked_count("every", every, 1)
    except ValueError:
        raise ValueError(
            '`every` must be "epoch" or an integer of at least 1. Received: '
            f"every={every!r}"
        ) from None


def _noise_scales(figures):
    """The noise scale of every method that reports what it is made of."""
    scales = {}
    for name in figures:
        method, _, key = name.partition("/")
        if key == _NOISE[0]:
            noise, size = (figures[f"{method}/{part}"] for part in _NOISE)
            scale = noise / size if size > 0.0 else float("nan")
            scales[f"{method}/noise_scale"] = scale
    return scales


def _means(samples):
    """Means of the figures that are one number, and their noise scales."""
    names = [n for n in samples[-1] if n.count("/") == 1]
    means = {
        name: float(np.mean([s[name] for s in samples if name in s]))
        for name in names
    }
    return {**means, **_noise_scales(means)}
