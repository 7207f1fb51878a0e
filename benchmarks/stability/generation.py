"""A small language model of characters, from stories to Shakespeare."""

import random

import keras
import numpy as np
from keras import layers

from stability import arms
from stability.pretrained_features import cached
from stability.task import FewRows

LENGTH = 64  # characters of a row
WIDTH, HEADS, BLOCKS = 64, 4, 1
LAST_SHARE = 0.1  # of the plays, at their end, half of it for tests
PRETRAINING_RATE, PRETRAINING_BATCH = 3e-3, 32


class Generation(FewRows):
    """A decoder of TinyStories learns from 20 kB of Shakespeare.

    We pretrain the decoder ourselves, once. A row is 64 characters.

    Args:
        rows: Int, of a run.
        epochs: Int.
        pretraining_steps: Int.
        scored: Int, rows of each of the two texts to score by.
    """

    name = "generation"
    metric = "validation loss"
    unit = "nats per character"
    higher_is_better = False
    # The rows have no classes to sort them by.
    arms = tuple(a for a in arms.COMMON if arms.ARMS[a].sorted_by != "labels")
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    batch_size = 16

    def __init__(self, rows=320, epochs=3, pretraining_steps=600, scored=320):
        super().__init__()
        self.rows, self.epochs = rows, epochs
        self.pretraining_steps, self.scored = pretraining_steps, scored
        kilobytes = round(rows * LENGTH / 1024)
        self.title = f"Decoder of stories, {kilobytes} kB of Shakespeare"

    def settings(self):
        return {
            **super().settings(),
            "pretraining_steps": self.pretraining_steps,
        }

    def prepare(self, data, cache):
        stories, plays = made_up() if data is None else read(data)
        self.characters = sorted(set(plays))
        cut = round(len(plays) * (1 - LAST_SHARE))
        self.pool = self._rows(plays[:cut])
        self.held_out, self.test = (
            tuple(part[half] for part in self._rows(plays[cut:]))
            for half in (slice(0, self.scored), slice(-self.scored, None))
        )
        if data is None:
            self.weights = self._pretrained(stories)
            return
        path = cache / f"decoder_{self.pretraining_steps}.npz"
        arrays = cached(
            path,
            lambda: {
                f"{place:03}": array
                for place, array in enumerate(self._pretrained(stories))
            },
        )
        self.weights = [arrays[place] for place in sorted(arrays)]

    def _rows(self, text):
        """Tuple of rows of characters, and of those that follow each."""
        # All characters that the plays do not have are one.
        number = {c: place for place, c in enumerate(self.characters)}
        numbers = np.array(
            [number.get(c, len(number)) for c in text], dtype="int32"
        )
        count = (len(numbers) - 1) // LENGTH
        return tuple(
            numbers[first : first + count * LENGTH].reshape(count, LENGTH)
            for first in (0, 1)
        )

    def _pretrained(self, stories):
        x, y = self._rows(stories)
        model = make_decoder(len(self.characters) + 1)
        model.compile(
            keras.optimizers.Adam(
                keras.optimizers.schedules.CosineDecay(
                    PRETRAINING_RATE, self.pretraining_steps
                )
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        order = np.random.default_rng(0).integers(
            len(x), size=self.pretraining_steps * PRETRAINING_BATCH
        )
        model.fit(
            x[order],
            y[order],
            batch_size=PRETRAINING_BATCH,
            shuffle=False,
            verbose=0,
        )
        return model.get_weights()

    def labels(self, rows, seed):
        return self.pool[1][rows]

    def make_model(self):
        model = make_decoder(len(self.characters) + 1)
        model.set_weights(self.weights)
        return model

    def make_base(self, rate):
        return keras.optimizers.AdamW(rate, weight_decay=0.01)

    def score(self, model, part):
        return {self.metric: -self._right(model, *getattr(self, part))}

    def _right(self, model, x, y):
        return -float(np.mean(self._losses(model, x, y)))

    def _losses(self, model, x, y):
        """Nats per character of each row."""
        logits = model.predict(x, batch_size=160, verbose=0)
        logits -= logits.max(axis=-1, keepdims=True)
        right = np.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        nats = np.log(np.exp(logits).sum(axis=-1)) - right
        return nats.mean(axis=1)


def make_decoder(characters, rate=0.1):
    """Causal transformer blocks with the norms in front."""

    def dropout(x):
        # Without a seed Keras leaves it to PyTorch, where it cannot be rewound.
        return layers.Dropout(rate, seed=random.randrange(2**31))(x)

    tokens = keras.Input((LENGTH,), dtype="int32")
    places = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = layers.Embedding(characters, WIDTH)(tokens)
    x = x + layers.Embedding(LENGTH, WIDTH)(places)
    for _ in range(BLOCKS):
        normed = layers.LayerNormalization()(x)
        attended = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(
            normed, normed, use_causal_mask=True
        )
        x = x + dropout(attended)
        hidden = layers.Dense(4 * WIDTH, activation="gelu")(
            layers.LayerNormalization()(x)
        )
        x = x + dropout(layers.Dense(WIDTH)(hidden))
    x = layers.LayerNormalization()(x)
    return keras.Model(tokens, layers.Dense(characters)(x))


def read(data):
    """The stories and the plays, as two strings."""
    texts = []
    for path in (
        data / "tinystories" / "tinystories_sample_2MiB.txt",
        data / "tinyshakespeare" / "input.txt",
    ):
        if not path.is_file():
            raise SystemExit(f"There is no file {path}. Expected: plain text.")
        texts.append(path.read_text(encoding="utf-8"))
    return texts[0].replace("<|endoftext|>", "\n"), texts[1]


def made_up(characters=12, length=20_000):
    """Two texts without any data: a random walk each over letters."""
    texts = []
    for seed, widest in ((0, 2), (1, 3)):
        steps = np.random.default_rng(seed).integers(1, widest + 1, length)
        places = np.cumsum(steps) % characters
        texts.append("".join(chr(ord("a") + place) for place in places))
    return texts
