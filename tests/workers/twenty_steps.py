"""Twenty float32 steps of GRAIN from fixed weights; prints the weights.

KERAS_BACKEND=... python twenty_steps.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401,I001  (imports torch before the backend)
import keras
import numpy as np

import keras_stab


def run(across):
    """Weights after 20 steps of a small convolutional network."""
    generator = np.random.default_rng(11)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(4, 3, activation="tanh")(inputs)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(8, activation="tanh")(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    model.set_weights(
        [generator.normal(0, 0.4, w.shape) for w in model.get_weights()]
    )
    model.compile(
        keras_stab.GRAIN(
            keras.optimizers.SGD(0.05, momentum=0.9), groups=4, across=across
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images = generator.normal(size=(20 * 16, 8, 8, 1)).astype("float32")
    labels = generator.integers(0, 3, size=len(images))
    model.fit(images, labels, batch_size=16, shuffle=False, verbose=0)
    return [w.tolist() for w in model.get_weights()]


def answers():
    return {"none": run(None), "batches": run("batches")}


if __name__ == "__main__":
    print(json.dumps(answers()))
