"""Snapshots of a training: what its steps change, to go back to."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_stab.backend import tracing
from keras_stab.callbacks.spike_figures import counts_of
from keras_stab.numerics import unusual

_KEY = "snapshot"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state before a step.

    Attributes:
        values: Of all `Snapshots.variables`.
        kept: Int, steps that the window had seen.
        epoch: Int.
        loss: Float, the median of the losses in the window; infinity before
            there are any.
    """

    values: list[Any]
    kept: int
    epoch: int
    loss: float


class Snapshots:
    """The newest snapshot, the last good one and the best one.

    Good is a snapshot once the next one is taken, since no spike came between.
    Best is the good one with the lowest loss. Often two of them are the same.

    Args:
        model: A compiled and built model with a built optimizer.
        watch: Its `SpikeWatch`.
        on_host: Whether copies are NumPy arrays.
    """

    ROLES = ("newest", "good", "best")

    def __init__(self, model, watch, on_host):
        self._model, self._watch, self._on_host = model, watch, on_host
        self.newest = self.good = self.best = None

    @property
    def variables(self):
        """Weights, seeds, optimizer, metrics and the window of the watch."""
        own = {id(v) for v in self._watch.variables}
        metrics = self._model.metrics_variables
        return [
            *self._model.variables,
            *self._model.optimizer.variables,
            self._watch.window,
            *[v for v in metrics if id(v) not in own],
        ]

    def take(self, epoch):
        """Takes the newest one; the one before is good from now on."""
        window = keras.ops.convert_to_numpy(self._watch.window)
        kept = int(counts_of(self._watch)[unusual.KEPT])
        losses = window[: min(kept, len(window)), 0]
        snapshot = Snapshot(
            [self._copy(tracing.read(v)) for v in self.variables],
            kept,
            epoch,
            float(np.median(losses)) if kept else float("inf"),
        )
        self.good = self.newest or snapshot
        self.newest = snapshot
        if self.best is None or self.good.loss <= self.best.loss:
            self.best = self.good

    def put_back(self, snapshot, epoch):
        """Gives all variables the values of a snapshot, which is the newest.

        Metrics of another epoch are not put back, but begin again.
        """
        self.newest = snapshot
        variables = self.variables
        for variable, value in zip(variables, snapshot.values):
            # A copy: a step may use the memory of the value for another.
            value = keras.ops.convert_to_tensor(value, variable.dtype)
            variable.assign(keras.ops.copy(value))
        # Some metrics are made in the first step.
        if snapshot.epoch != epoch or len(variables) > len(snapshot.values):
            self._model.reset_metrics()

    def _copy(self, value):
        value = keras.ops.stop_gradient(value)
        if self._on_host:
            return np.array(keras.ops.convert_to_numpy(value))
        return keras.ops.copy(value)

    def save(self, store):
        """Writes the snapshots beside the variables of the watch."""
        if self.newest is None:
            return
        held = [getattr(self, role) for role in self.ROLES]
        different = list({id(s): s for s in held}.values())
        places = [[id(s) for s in different].index(id(s)) for s in held]
        store[f"{_KEY}_places"] = np.array(places)
        for k, snapshot in enumerate(different):
            store[f"{_KEY}_{k}_counts"] = np.array(
                [snapshot.kept, snapshot.epoch]
            )
            store[f"{_KEY}_{k}_loss"] = np.array(snapshot.loss)
            for i, value in enumerate(snapshot.values):
                value = keras.ops.convert_to_numpy(value)
                store[f"{_KEY}_{k}_{i}"] = value

    def load(self, saved):
        """Reads what `save` wrote, a dict of arrays, if it fits the model."""
        self.newest = self.good = self.best = None
        if f"{_KEY}_places" not in saved:
            return
        shapes = [tuple(v.shape) for v in self.variables]
        places = [int(p) for p in saved[f"{_KEY}_places"]]
        found = {}
        for k in set(places):
            names = [f"{_KEY}_{k}_{i}" for i in range(len(shapes))]
            if [saved[n].shape for n in names if n in saved] != shapes:
                return
            kept, epoch = (int(n) for n in saved[f"{_KEY}_{k}_counts"])
            values = [np.array(saved[n]) for n in names]
            if not self._on_host:
                values = [
                    keras.ops.convert_to_tensor(value, variable.dtype)
                    for value, variable in zip(values, self.variables)
                ]
            loss = float(saved[f"{_KEY}_{k}_loss"])
            found[k] = Snapshot(values, kept, epoch, loss)
        self.newest, self.good, self.best = (found[p] for p in places)
