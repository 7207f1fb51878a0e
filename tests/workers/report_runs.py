"""Runs for tests of the stability report, importable by other processes."""

import os
import signal
from pathlib import Path

import keras
import numpy as np

SHIFT = {"SGD": 0, "Adam": 1}


def simulated(optimizer, seeds):
    """A score without training: a shift for the arm, noise for the seeds."""
    shift = SHIFT[type(optimizer).__name__]
    common = np.random.default_rng(seeds.initialisation).normal()
    own = np.random.default_rng([seeds.order, 1 + shift]).normal()
    return 80.0 + shift + common + 0.1 * own


def _data():
    random = np.random.default_rng(0)
    x = random.normal(size=(32, 3)).astype("float32")
    return x, (x.sum(axis=1) > 0).astype("int32")


def trained(optimizer, seeds):
    """A very small classifier; initialisation and order by their seeds."""
    x, y = _data()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # Nothing is gained by compiling two steps.
        run_eagerly=keras.backend.backend() != "jax",
    )
    start = np.abs(model.get_weights()[0]).sum()
    order = np.random.default_rng(seeds.order).permutation(len(x))
    history = model.fit(
        x[order], y[order], batch_size=16, shuffle=False, verbose=0
    )
    logits = keras.ops.convert_to_numpy(model(x))
    return {
        "accuracy": np.mean(logits.argmax(axis=1) == y),
        "loss": history.history["loss"][-1],
        "start": start,
        "losses": history.history["loss"],
        "predictions": logits,
        "targets": y,
    }


class Troubled:
    """At one run it kills its process, then errs, and works the third time."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, optimizer, seeds):
        if seeds.order == 1 and isinstance(optimizer, keras.optimizers.SGD):
            marks = [Path(self.folder, mark) for mark in ("once", "twice")]
            if not marks[0].exists():
                marks[0].touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if not marks[1].exists():
                marks[1].touch()
                mistaken(optimizer, seeds)
        return trained(optimizer, seeds)


def mistaken(optimizer, seeds):
    raise TypeError("a mistake in the code")
