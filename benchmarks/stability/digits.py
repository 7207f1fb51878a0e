"""Handwritten digits with wrong labels: needs no data set from outside."""

import keras
import numpy as np

from stability import arms
from stability.task import FewRows

POOL, HELD_OUT = 1000, 300
LONG = 40


class Digits(FewRows):
    """A perceptron on 8 x 8 digits of scikit-learn, a quarter wrong labels.

    Args:
        rows: Int, of a run.
        epochs: Int; 40 give time to memorise the wrong labels.
    """

    arms = arms.COMMON
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    classes = 10
    wrong_share = 0.25
    watches_grain = True
    batch_size = 32

    def __init__(self, rows=256, epochs=12):
        super().__init__()
        self.rows, self.epochs = rows, epochs
        self.name = "digits_wrong" if epochs < LONG else "digits_wrong_long"
        self.title = f"Digits, {rows} rows, 25 % wrong labels, {epochs} epochs"

    def prepare(self, data, cache):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(y))
        x, y = (x[order] / 16).astype("float32"), y[order].astype("int32")
        parts = np.split(np.arange(len(y)), (POOL, POOL + HELD_OUT))
        self.pool, self.held_out, self.test = ((x[p], y[p]) for p in parts)

    def make_model(self):
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((64,)),
                layers.Dense(128, activation="relu"),
                layers.Dense(128, activation="relu"),
                layers.Dense(self.classes),
            ]
        )

    def make_base(self, rate):
        return keras.optimizers.AdamW(rate, weight_decay=0.01)
