"""What GRAIN does during training, and whether it acts as a smaller rate."""

import keras
import numpy as np

import keras_stab
from stability import study
from stability.arms import ARMS
from stability.task import TUNING_SEEDS

SEEDS = TUNING_SEEDS
ARMS_WATCHED = ("grain_4", "grain_8", "grain_16", "grain_labels")
FIGURES = ("norm_ratio", "support_size", "conflict_rate", "min_cosine")


class Watch(keras.callbacks.Callback):
    """Keeps the figures of each step, and how far it goes."""

    def __init__(self):
        super().__init__()
        self.figures = {name: [] for name in FIGURES}
        self.lengths = []

    def start(self, model):
        self.first = self.last = weights_of(model)

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


def watch(name, plan, rates):
    """Dict from arm to the summaries of its runs, one for each seed.

    Args:
        name: Key of a task.
        plan: The `Plan`.
        rates: Dict from arm to rate. All arms train at the rate of the base,
            so that the lengths of their steps can be compared.
    """
    task = study.prepared(name, plan.data, plan.folder)
    rate, found = rates["base"], {}
    for arm in ("base", *ARMS_WATCHED):
        for seed in SEEDS:
            keras.utils.set_random_seed(seed)
            model = task.models.rewound(study.maker(arm, rate, task)())
            watcher = Watch()
            watcher.start(model)
            fit = model.fit
            # The callback goes into the calls that the task makes.
            model.fit = lambda *args, fit=fit, own=watcher, **options: fit(
                *args, callbacks=[own], **options
            )
            try:
                seeds = keras_stab.diagnostics.RunSeeds(seed, seed)
                task.train(model, seeds, ARMS[arm])
            finally:
                del model.fit
            found.setdefault(arm, []).append(watcher.summary())
    return found
