"""The models and the steps whose messages are counted.

Keras is imported inside functions only: see `on_jax.py`.
"""

import dataclasses
import math
from collections.abc import Callable

ROWS = 64
DEVICES = 4
CLASSES = 10
TOKENS = 16
VOCABULARY = 500
WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its made-up data, and the layer in which rows are counted.

    Attributes:
        layer: Input and output length of a matrix product that no other part
            of the step has: as many rows as it has are computed.
        products: How many such products the step of a stock optimizer has
            for each row of the batch.
    """

    name: str
    words: str
    make: Callable
    data: Callable
    layer: tuple[int, int]
    products: int


def _mlp():
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(256, "relu"),
            layers.Dense(256, "relu"),
            layers.Dense(CLASSES),
        ]
    )


def _transformer():
    import keras

    layers = keras.layers
    inputs = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(4, WIDTH // 4)(y, y)
        x = layers.Add()([x, y])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(3 * WIDTH, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def _vectors(random):
    return random.standard_normal((ROWS, 64), dtype="float32")


def _sentences(random):
    return random.integers(0, VOCABULARY, (ROWS, TOKENS)).astype("int32")


MODELS = [
    # Forward and backward, 256 to 256.
    Model("mlp", "perceptron 64-256-256-10", _mlp, _vectors, (256, 256), 2),
    # Forward, and back through the layer after it, in two blocks at each token.
    Model(
        "transformer",
        "transformer, 2 blocks of width 80, 16 tokens",
        _transformer,
        _sentences,
        (WIDTH, 3 * WIDTH),
        4 * TOKENS,
    ),
]


def make_data(model):
    """One batch of made-up rows."""
    import numpy as np

    random = np.random.default_rng(1)
    labels = random.integers(0, CLASSES, ROWS).astype("int32")
    return model.data(random), labels


@dataclasses.dataclass(frozen=True)
class Arm:
    """A train step: what GRAIN is made with, or `None` for plain Adam."""

    name: str
    words: str
    options: dict | None


ARMS = [
    Arm("adam", "Adam", None),
    *(
        Arm(
            f"{engine}_{groups}",
            f"GRAIN, {words}, K = {groups}",
            {"groups": groups, "engine": engine},
        )
        for engine, words in (
            ("one_pass", "one pass"),
            ("microbatch", "small batches"),
        )
        for groups in (4, 8)
    ),
    Arm(
        "replicas",
        'GRAIN, `across="replicas"`, K = 4',
        {"groups": 1, "across": "replicas"},
    ),
]


def make_optimizer(arm):
    import keras

    import keras_stab

    inner = keras.optimizers.Adam(1e-3)
    if arm.options is None:
        return inner
    return keras_stab.GRAIN(inner, **arm.options)


def make_model(model, arm):
    """A compiled model with the same weights in every process."""
    import keras

    keras.utils.set_random_seed(1)
    network = model.make()
    network.compile(
        make_optimizer(arm),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return network


def number_of_weights(network):
    return sum(math.prod(v.shape) for v in network.trainable_variables)


def by_name(things, name):
    return next(thing for thing in things if thing.name == name)


def summary(weights, messages):
    """What one device sends and is given, over the bytes of the weights.

    Args:
        weights: Int, how many the model has; 4 bytes each.
        messages: List of triples: kind of a collective, how many of them, and
            bytes of the result of all of them on one device.
    """
    whole = 4 * weights
    kinds = sorted({kind for kind, _, _ in messages})
    return {
        "weights": weights,
        "payload": sum(size for _, _, size in messages) / whole,
        "sent": sum(
            sent_by_ring(kind, size, DEVICES) for kind, _, size in messages
        )
        / whole,
        "collectives": {
            kind: sum(count for own, count, _ in messages if own == kind)
            for kind in kinds
        },
    }


def sent_by_ring(kind, result, devices):
    """Bytes that leave one device, of a collective with that result.

    The least that is possible, which ring algorithms reach.
    """
    shares = {
        "all-reduce": 2 * (devices - 1) / devices,
        "all-gather": (devices - 1) / devices,
        "all-to-all": (devices - 1) / devices,
        "reduce-scatter": devices - 1,
        "collective-permute": 1,
        "broadcast": 1,
        "copy": 1,
    }
    return shares[kind] * result
