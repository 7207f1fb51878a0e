"""Classification of sentences: the top layer of a pretrained encoder."""

import keras
import numpy as np

from stability import arms
from stability import pretrained_features
from stability.task import FewRows

# Folder, columns, the label of class 1, and tokens of a row.
DATA = {
    "sst2": ("SST-2", ("sentence",), "label", "1", 32),
    "mrpc": ("MRPC", ("#1 String", "#2 String"), "Quality", "1", 64),
    "stsb": ("STS-B", ("sentence1", "sentence2"), "score", None, 40),
    "rte": ("RTE", ("sentence1", "sentence2"), "label", "entailment", 64),
}
INPUTS = ("first", "key", "value", "mask")
POOL, HELD_OUT = 1500, 400
LEAST_WORDS = 8
STEPS = {64: (16, 8), 256: (32, 4)}


class TextClassification(FewRows):
    """A few rows of a task of GLUE; right labels, or a quarter wrong.

    Args:
        data: `"sst2"`, `"mrpc"` or `"rte"`.
        rows: Int, 64 or 256.
        wrong_share: Float, of wrong labels among those rows.
    """

    arms = arms.COMMON
    watches_grain = True
    rates = (1e-4, 3e-4, 1e-3, 3e-3)

    def __init__(self, data, rows, wrong_share=0.0):
        super().__init__()
        self.source, self.rows, self.wrong_share = data, rows, wrong_share
        self.batch_size, self.epochs = STEPS[rows]
        folder, *_, self.tokens = DATA[data]
        self.name = f"{data}_{rows}" + ("_wrong" if wrong_share else "")
        self.title = f"{folder}, {rows} rows" + (
            f", {100 * wrong_share:.0f} % wrong labels" if wrong_share else ""
        )

    def prepare(self, data, cache):
        arrays = pretrained_features.cached(
            cache / f"{self.source}.npz", lambda: self._features(data)
        )
        for part in ("pool", "held_out", "test"):
            x = {name: arrays[f"{part}_{name}"] for name in INPUTS}
            setattr(self, part, (x, arrays[f"{part}_labels"]))
        self.top_weights = pretrained_features.cached_weights(cache)

    def _features(self, data):
        encoder = pretrained_features.Encoder()
        train, test = (
            self._read(data, f"{split}.tsv") for split in ("train", "dev")
        )
        order = np.random.default_rng(0).permutation(len(train[1]))
        parts = {
            "pool": order[:POOL],
            "held_out": order[POOL : POOL + HELD_OUT],
            "test": None,
        }
        arrays = {}
        for part, rows in parts.items():
            texts, labels = test if rows is None else train
            if rows is not None:
                texts = tuple([own[i] for i in rows] for own in texts)
                labels = labels[rows]
            texts = texts[0] if len(texts) == 1 else texts
            for name, array in encoder.features(texts, self.tokens).items():
                arrays[f"{part}_{name}"] = array
            arrays[f"{part}_labels"] = labels
        return arrays

    def _read(self, data, file):
        """Tuple of columns of sentences, and labels."""
        folder, columns, label, *_ = DATA[self.source]
        *texts, labels = pretrained_features.read_table(
            data / "glue" / folder / file, (*columns, label)
        )
        labels = self.targets(labels)
        if len(columns) > 1 or file != "train.tsv":
            return tuple(texts), labels
        # Many training rows of SST-2 are phrases; the test rows are sentences.
        keep = [
            i for i, s in enumerate(texts[0]) if len(s.split()) >= LEAST_WORDS
        ]
        return ([texts[0][i] for i in keep],), labels[keep]

    def targets(self, strings):
        """What is learnt, of a column of the file."""
        one = DATA[self.source][3]
        return np.array([int(own == one) for own in strings], "int32")

    def make_model(self):
        return pretrained_features.make_top(
            self.tokens, self.classes, self.top_weights
        )

    def make_base(self, rate):
        return keras.optimizers.AdamW(rate, weight_decay=0.01)
