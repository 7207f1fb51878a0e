"""Likeness of two sentences: the top layer of a pretrained encoder."""

import keras
import numpy as np

from stability import pretrained_features
from stability.text_classification import TextClassification

MOST = 5.0


class TextRegression(TextClassification):
    """256 rows of STS-B: how alike two sentences are, from 0 to 5.

    Args:
        rows: Int, 64 or 256.
    """

    metric = "correlation"
    unit = "points"
    rates = (1e-4, 3e-4, 1e-3, 3e-3)

    def __init__(self, rows=256):
        super().__init__("stsb", rows)

    def targets(self, strings):
        return np.array(strings, "float32") / MOST

    def make_model(self):
        return pretrained_features.make_top(self.tokens, 1, self.top_weights)

    def compile(self, model, optimizer):
        model.compile(optimizer, keras.losses.MeanSquaredError())

    def _losses(self, model, x, labels):
        predicted = model.predict(x, batch_size=256, verbose=0)[:, 0]
        return (predicted - labels) ** 2

    def score(self, model, part):
        return {self.metric: self._right(model, *getattr(self, part))}

    def _right(self, model, x, y):
        """Pearson's correlation, times 100."""
        predicted = model.predict(x, batch_size=256, verbose=0)[:, 0]
        return 100.0 * np.corrcoef(predicted, y)[0, 1]
