"""What GRAIN does during training: does it act as a smaller rate?"""

import keras
import numpy as np

import keras_stab

WATCHED = ("grain_4", "grain_8", "grain_16", "grain_labels", "grain_losses")
FIGURES = ("norm_ratio", "support_size", "conflict_rate", "min_cosine")


class Watch(keras.callbacks.Callback):
    """Keeps the figures of each step, and how far it goes."""

    def __init__(self):
        super().__init__()
        self.figures = {name: [] for name in FIGURES}
        self.lengths = []
        self.first = self.last = None

    def on_train_begin(self, logs=None):
        # An arm may call `fit` several times.
        if self.last is None:
            self.first = self.last = weights_of(self.model)

    def on_train_batch_end(self, batch, logs=None):
        now = weights_of(self.model)
        self.lengths.append(np.linalg.norm(now - self.last))
        self.last = now
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras_stab.GRAIN):
            figures = optimizer.diagnostics()
            for name, values in self.figures.items():
                values.append(figures[name])

    def summary(self):
        """Means over the run; lengths of the path and of its chord."""
        return {
            **{
                name: float(np.mean(values))
                for name, values in self.figures.items()
                if values
            },
            "path": float(np.sum(self.lengths)),
            "distance": float(np.linalg.norm(self.last - self.first)),
        }


def weights_of(model):
    return np.concatenate(
        [
            keras.ops.convert_to_numpy(v).reshape(-1)
            for v in model.trainable_variables
        ]
    )


def watch(trained, rate, seeds):
    """Dict from arm to the summaries of its runs, one for each seed.

    Args:
        trained: Function `(arm, rate, seed, callback)` that trains a run.
        rate: That of the base for all arms, so that the lengths of their
            steps can be compared.
        seeds: Those of the runs.
    """
    found = {}
    for arm in ("base", *WATCHED):
        for seed in seeds:
            watcher = Watch()
            trained(arm, rate, seed, watcher)
            found.setdefault(arm, []).append(watcher.summary())
    return found
