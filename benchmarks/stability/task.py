"""What a task is: a model, its data, a base optimizer, and a score."""

import abc
from typing import ClassVar

import keras
import numpy as np

from stability.reuse import CompiledModels

# The seeds of the search for rates; no reported run has one of these.
TUNING_SEEDS = tuple(range(1000, 1008))
PARTS = ("held_out", "test")


class Task(abc.ABC):
    """One small problem on which arms are compared.

    A subclass sets the attributes below and defines `prepare`, `make_model`,
    `make_base`, `compile`, `train` and `score`.

    Attributes:
        name: String, also of the results file.
        title: String for tables: data, model and rows in a few words.
        metric: String, what `score` names the number to compare.
        unit: String behind differences of the metric.
        higher_is_better: Boolean.
        rates: Learning rates of the base optimizer to search, at least four.
        steps: Int, updates of a run.
        arms: Names of arms in `stability.arms`; the first is the base.
        watches_grain: Whether the figures of GRAIN during training are kept.
        failure_score: A run that scores no better than this has failed.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    rates: ClassVar[tuple[float, ...]]
    steps: ClassVar[int]
    arms: ClassVar[tuple[str, ...]]
    watches_grain: ClassVar[bool] = False
    failure_score: ClassVar[float | None] = None

    def __init__(self):
        self.models = CompiledModels(self)

    def settings(self):
        """What the scores depend on, for the files of runs."""
        return {"name": self.name, "steps": self.steps}

    @abc.abstractmethod
    def prepare(self, data, cache):
        """Reads the data, once in each process.

        Args:
            data: Path with the folders of the data sets.
            cache: Path for what takes long to compute.
        """

    @abc.abstractmethod
    def make_model(self):
        """A new model, not compiled; its weights follow Keras's seed."""

    @abc.abstractmethod
    def make_base(self, rate):
        """The base optimizer at a learning rate."""

    @abc.abstractmethod
    def compile(self, model, optimizer):
        """Compiles a model of `make_model`."""

    @abc.abstractmethod
    def train(self, model, seeds, arm, callbacks=None):
        """Trains a compiled model; only this is timed.

        Args:
            model: Compiled, at its first weights.
            seeds: Its `initialisation` draws the rows, its `order` their
                order.
            arm: The `Arm`, which may stop early or sort the batches.
            callbacks: List, for each call of `fit`.
        """

    @abc.abstractmethod
    def score(self, model, part):
        """A dict with the metric, and with `predictions` and `targets` where
        the task has classes.

        Args:
            model: Trained.
            part: `"held_out"` to choose rates by, or `"test"`.
        """


class FewRows(Task):
    """A classifier trained on a few rows, drawn anew for each seed.

    `prepare` of a subclass sets `self.pool`, `self.held_out` and `self.test`,
    each a tuple of inputs (an array or a dict of arrays) and classes.

    Attributes:
        rows: Int, of a run.
        batch_size: Int; divides `rows`.
        epochs: Int.
        wrong_share: Float, of the drawn rows that get a wrong label.
    """

    metric = "accuracy"
    unit = "points"
    rows: ClassVar[int]
    batch_size: ClassVar[int]
    epochs: ClassVar[int]
    wrong_share: ClassVar[float] = 0.0
    classes: ClassVar[int] = 2

    @property
    def steps(self):
        return self.epochs * self.rows // self.batch_size

    def settings(self):
        return {
            **super().settings(),
            "rows": self.rows,
            "batch_size": self.batch_size,
            "wrong_share": self.wrong_share,
        }

    def draw(self, seed):
        """Row numbers: those of a run, and others to stop early by."""
        random = np.random.default_rng([seed, 0])
        chosen = random.permutation(len(self.pool[1]))
        return chosen[: self.rows], chosen[self.rows : 2 * self.rows]

    def labels(self, rows, seed):
        """Labels of rows, with a share of wrong ones."""
        labels = self.pool[1][rows].copy()
        random = np.random.default_rng([seed, 1])
        wrong = random.permutation(len(rows))[
            : round(self.wrong_share * len(rows))
        ]
        shift = random.integers(1, self.classes, len(wrong))
        labels[wrong] = (labels[wrong] + shift) % self.classes
        return labels

    def compile(self, model, optimizer):
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )

    def train(self, model, seeds, arm, callbacks=None):
        rows, others = self.draw(seeds.initialisation)
        labels = self.labels(rows, seeds.initialisation)
        x = taken(self.pool[0], rows)
        random = np.random.default_rng([seeds.order, 2])
        orders = [random.permutation(len(rows)) for _ in range(self.epochs)]
        if arm.sorted_by == "labels":
            orders = [self._sorted(order, labels) for order in orders]
        # The same steps in one call of `fit`, which costs as much as some.
        whole = not arm.stops_early and arm.sorted_by != "losses"
        best = -np.inf, None
        for order in [np.concatenate(orders)] if whole else orders:
            if arm.sorted_by == "losses":
                order = self._sorted(order, self._losses(model, x, labels))
            model.fit(
                taken(x, order),
                labels[order],
                batch_size=self.batch_size,
                shuffle=False,
                callbacks=callbacks,
                verbose=0,
            )
            if arm.stops_early:
                right = self._right(
                    model,
                    taken(self.pool[0], others),
                    self.labels(others, seeds.initialisation),
                )
                if right > best[0]:
                    best = right, model.get_weights()
        if arm.stops_early:
            model.set_weights(best[1])

    def _sorted(self, order, values):
        """The same batches, the rows of each in rising order of values."""
        batches = order.reshape(-1, self.batch_size)
        places = np.argsort(values[batches], axis=1, kind="stable")
        return np.take_along_axis(batches, places, axis=1).reshape(-1)

    def _losses(self, model, x, labels):
        """The loss of each row now; of a cross-entropy from logits."""
        logits = model.predict(x, batch_size=256, verbose=0)
        logits = logits - logits.max(axis=1, keepdims=True)
        right = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return np.log(np.exp(logits).sum(axis=1)) - right

    def score(self, model, part):
        x, y = getattr(self, part)
        predictions = model.predict(x, batch_size=256, verbose=0)
        return {
            self.metric: 100.0 * np.mean(predictions.argmax(-1) == y),
            "predictions": predictions,
            "targets": y,
        }

    def _right(self, model, x, y):
        return np.mean(model.predict(x, verbose=0).argmax(-1) == y)


def taken(x, rows):
    """Rows of an array, or of each array of a dict."""
    return keras.tree.map_structure(lambda part: part[rows], x)
