"""Small models of every kind, each with its data and compile arguments."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers
from keras import ops

BACKEND = keras.backend.backend()


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of model.

    Attributes:
        model: Makes the model, not compiled; equal seeds, equal weights.
        data: From a number of rows to `(x, y, sample_weight)`.
        compile: Makes the arguments of `compile` besides the optimizer.
        pooled: Whether groups leave the same state behind as the whole
            batch would. The statistics of a second batch-norm layer do not.
    """

    model: Callable
    data: Callable
    compile: Callable = lambda: {"loss": "mse"}
    pooled: bool = True

    def make(self, optimizer, seed=3, **arguments):
        """The compiled model; the same weights for the same seed."""
        keras.utils.set_random_seed(seed)
        model = self.model()
        model.compile(optimizer=optimizer, **{**self.compile(), **arguments})
        return model


def take(data, rows):
    """Some rows of every array in a nested structure."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else leaf[rows], data
    )


def state(model):
    """All of the model's variables, seeds included, as arrays."""
    return [
        np.array(ops.convert_to_numpy(v.value), copy=True)
        for v in model.variables
    ]


def set_state(model, values):
    for variable, value in zip(model.variables, values):
        variable.assign(value)


# ---- Data -----------------------------------------------------------------


def regression(rows, features=3, targets=2):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, features)).astype("float32")
    y = rng.normal(size=(rows, targets)).astype("float32")
    return x, y, None


def weighted(rows):
    x, y, _ = regression(rows)
    weights = np.linspace(0.2, 3.0, rows).astype("float32")
    return x, y, weights


def images(rows):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 4, 4, 2)).astype("float32")
    y = rng.normal(size=(rows, 2)).astype("float32")
    return x, y, None


def tokens(rows):
    """Sequences of token ids, padded with 0; every row starts with one."""
    rng = np.random.default_rng(rows)
    x = rng.integers(1, 7, size=(rows, 5)).astype("int32")
    for i in range(rows):
        x[i, 1 + i % 5 :] = 0
    y = rng.normal(size=(rows, 2)).astype("float32")
    return x, y, None


def token_targets(rows):
    x, _, _ = tokens(rows)
    rng = np.random.default_rng(rows)
    return x, rng.integers(0, 3, size=(rows, 5)).astype("int32"), None


def lists(rows):
    x, y, _ = regression(rows)
    return [x, x[:, :1] ** 2], [y, y[:, :1] - x[:, :1]], None


def dicts(rows):
    (first, second), (left, right), _ = lists(rows)
    return (
        {"first": first, "second": second},
        {"left": left, "right": right},
        None,
    )


def weighted_dicts(rows):
    x, y, _ = dicts(rows)
    weights = np.linspace(0.2, 3.0, rows).astype("float32")
    return x, y, {"left": weights, "right": weights[::-1].copy()}


def inputs_only(rows):
    return regression(rows)[0], None, None


# ---- Layers ---------------------------------------------------------------


class Penalty(layers.Layer):
    """Adds a loss that depends on its input and a weight."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), name="scale")

    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(x * self.scale - 1.0)))
        return x * self.scale


class Counter(layers.Layer):
    """Counts its training steps and averages its inputs."""

    def build(self, input_shape):
        options = {"initializer": "zeros", "trainable": False}
        self.steps = self.add_weight(
            shape=(), dtype="int32", name="steps", **options
        )
        self.average = self.add_weight(
            shape=(input_shape[-1],), name="average", **options
        )

    def call(self, x, training=False):
        if training:
            self.steps.assign_add(1)
            average = ops.cast(self.average, "float32")
            self.average.assign(0.9 * average + 0.1 * ops.mean(x, axis=0))
        return x


class UnseededNoise(layers.Layer):
    """Draws from Keras's global seed generator, which no model owns."""

    def call(self, x, training=False):
        if training:
            return x + keras.random.normal(ops.shape(x))
        return x


class Multiply(layers.Layer):
    """One weight, which starts at 1."""

    def build(self, input_shape):
        self.factor = self.add_weight(
            shape=(), initializer="ones", name="factor"
        )

    def call(self, x):
        return x * self.factor


# ---- Models ---------------------------------------------------------------


def sequential(*stack, inputs=(3,), **options):
    def build():
        return keras.Sequential([keras.Input(inputs, **options), *_new(stack)])

    return build


def _new(stack):
    # A table of cases must not create layers: their seeds are drawn when the
    # model is made.
    return [make() for make in stack]


def dense(units, **options):
    return lambda: layers.Dense(units, **options)


def unbuilt():
    return keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(2)])


def functional():
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, "tanh")(inputs)
    return keras.Model(inputs, layers.Dense(2)(hidden))


def shared():
    """A layer used twice, inside a model inside a model."""
    inputs = keras.Input((3,))
    twice = layers.Dense(3, "tanh")
    inner = keras.Model(inputs, twice(twice(inputs)))
    outer = keras.Input((3,))
    return keras.Model(outer, layers.Dense(2)(inner(outer) + outer))


def _two_branches(inputs):
    first, second = inputs
    merged = layers.Concatenate()([layers.Dense(4, "tanh")(first), second])
    return (
        layers.Dense(2, name="left")(merged),
        layers.Dense(1, name="right")(merged),
    )


def list_model():
    inputs = [keras.Input((3,)), keras.Input((1,))]
    return keras.Model(inputs, list(_two_branches(inputs)))


def dict_model():
    inputs = {
        "first": keras.Input((3,), name="first"),
        "second": keras.Input((1,), name="second"),
    }
    left, right = _two_branches(list(inputs.values()))
    return keras.Model(inputs, {"left": left, "right": right})


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, "tanh")
        self.out = layers.Dense(2)

    def call(self, x):
        return self.out(self.hidden(x))


class SubclassedTraining(Subclassed):
    """Its output tells whether it was called in training mode."""

    def call(self, x, training=False):
        return self.out(self.hidden(x)) * (1.5 if training else -1.0)


class OwnLoss(Subclassed):
    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        error = ops.mean(ops.abs(ops.subtract(y_pred, y)) ** 3)
        # Tells whether it was called in training mode.
        return error * (0.1 if training else 10.0)


class OwnLossWithoutTraining(Subclassed):
    def compute_loss(self, x, y, y_pred, sample_weight):
        return super().compute_loss(x, y, y_pred, sample_weight) * 2.0


class OwnLossMetric(Subclassed):
    """The example in the documentation of `Model.compute_loss`."""

    def __init__(self):
        super().__init__()
        self.own_tracker = keras.metrics.Mean(name="own_loss")

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        loss = ops.mean(ops.square(ops.subtract(y_pred, y)))
        self.own_tracker.update_state(loss, sample_weight=ops.shape(x)[0])
        return loss

    def reset_metrics(self):
        self.own_tracker.reset_state()

    @property
    def metrics(self):
        return [self.own_tracker]


class OwnMetrics(Subclassed):
    def __init__(self):
        super().__init__()
        self.spread = keras.metrics.Mean(name="spread")

    def compute_metrics(self, x, y, y_pred, sample_weight):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        # In the order of the rows: a wrong order changes it.
        difference = ops.abs(ops.subtract(y_pred[:1], y[-1:]))
        self.spread.update_state(ops.mean(difference))
        return {**results, "spread": self.spread.result()}


class Disconnected(Subclassed):
    """A weight that the loss does not depend on."""

    def build(self, input_shape):
        self.unused = self.add_weight(shape=(2,), name="unused")
        super().build(input_shape)


class FirstRowsOnly(Subclassed):
    """A weight that only the rows with a positive first input reach."""

    def build(self, input_shape):
        self.gate = self.add_weight(shape=(2,), name="gate")
        super().build(input_shape)

    def call(self, x):
        return super().call(x) + self.gate * ops.relu(x[:, :1])


def frozen():
    model = functional()
    model.layers[1].trainable = False
    return model


def frozen_batch_norm():
    model = sequential(dense(4), layers.BatchNormalization, dense(2))()
    model.layers[1].trainable = False
    return model


def attention():
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4)(inputs)
    mixed = layers.MultiHeadAttention(2, 2)(hidden, hidden)
    hidden = layers.LayerNormalization()(hidden + mixed)
    pooled = layers.GlobalAveragePooling1D()(hidden)
    return keras.Model(inputs, layers.Dense(2)(pooled))


def nested_batch_norm():
    inputs = keras.Input((3,))
    first = sequential(lambda: layers.BatchNormalization(momentum=0.7))()
    return keras.Model(inputs, layers.Dense(2)(first(inputs)))


def _embedding():
    return layers.Embedding(7, 4, mask_zero=True)


def _loss(loss, **options):
    return lambda: {"loss": loss, **options}


CASES = {
    "functional": Case(
        functional, regression, _loss("mse", metrics=["mae", "mse"])
    ),
    "sequential_unbuilt": Case(unbuilt, regression),
    "subclassed": Case(Subclassed, regression, _loss("mae", metrics=["mse"])),
    "subclassed_training": Case(SubclassedTraining, regression),
    "shared_layers": Case(shared, regression),
    "lists": Case(
        list_model,
        lists,
        _loss(
            ["mse", "mae"], loss_weights=[0.4, 2.0], metrics=[["mae"], ["mse"]]
        ),
    ),
    "dicts": Case(
        dict_model,
        dicts,
        lambda: {
            "loss": {"left": "mse", "right": "mae"},
            "loss_weights": {"left": 0.4, "right": 2.0},
            "metrics": {"left": ["mae"]},
        },
    ),
    "sample_weight": Case(
        functional,
        weighted,
        _loss("mse", metrics=["mae"], weighted_metrics=["mse"]),
    ),
    "sample_weight_mean": Case(
        functional,
        weighted,
        lambda: {
            "loss": keras.losses.MeanSquaredError("mean_with_sample_weight")
        },
    ),
    "sample_weight_dicts": Case(
        dict_model,
        weighted_dicts,
        lambda: {
            "loss": {"left": "mse", "right": "mae"},
            "weighted_metrics": {"right": ["mse"]},
        },
    ),
    "compute_loss": Case(OwnLoss, regression, dict),
    "compute_loss_without_training": Case(OwnLossWithoutTraining, regression),
    "compute_loss_metric": Case(OwnLossMetric, regression, dict),
    "compute_metrics": Case(OwnMetrics, regression),
    "regularizers": Case(
        sequential(
            dense(
                4,
                kernel_regularizer="l2",
                bias_regularizer="l1",
                activity_regularizer="l2",
            ),
            dense(2),
        ),
        regression,
    ),
    "add_loss": Case(sequential(dense(3), Penalty, dense(2)), regression),
    "add_loss_only": Case(sequential(dense(3), Penalty), inputs_only, dict),
    "frozen_layer": Case(frozen, regression),
    "disconnected": Case(Disconnected, regression),
    "partly_connected": Case(FirstRowsOnly, regression),
    "counter": Case(sequential(Counter, dense(2)), regression),
    "batch_norm": Case(nested_batch_norm, regression),
    "two_batch_norms": Case(
        sequential(
            layers.BatchNormalization,
            dense(4, activation="tanh"),
            layers.BatchNormalization,
            dense(2),
        ),
        regression,
        pooled=False,
    ),
    "frozen_batch_norm": Case(frozen_batch_norm, regression),
    "convolution_batch_norm": Case(
        sequential(
            lambda: layers.Conv2D(3, 3, activation="tanh"),
            layers.BatchNormalization,
            layers.Flatten,
            dense(2),
            inputs=(4, 4, 2),
        ),
        images,
    ),
    "masked_lstm": Case(
        sequential(
            _embedding,
            lambda: layers.LSTM(3),
            dense(2),
            inputs=(5,),
            dtype="int32",
        ),
        tokens,
    ),
    "masked_loss": Case(
        sequential(_embedding, dense(3), inputs=(5,), dtype="int32"),
        token_targets,
        lambda: {
            "loss": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            ),
            "weighted_metrics": ["accuracy"],
        },
    ),
    "attention": Case(attention, tokens),
}

# Models whose output is random in training: groups draw their own numbers, so
# the rows of a group alone do not tell what the group should have done.
RANDOM_CASES = {
    "dropout": Case(
        sequential(
            dense(8), lambda: layers.Dropout(0.5), Multiply, inputs=(3,)
        ),
        lambda rows: regression(rows, targets=8),
    ),
    "seeded_dropout": Case(
        sequential(dense(8), lambda: layers.Dropout(0.5, seed=5), Multiply),
        lambda rows: regression(rows, targets=8),
    ),
    "gaussian_noise": Case(
        sequential(lambda: layers.GaussianNoise(1.0), dense(2)), regression
    ),
    "recurrent_dropout": Case(
        sequential(
            _embedding,
            lambda: layers.SimpleRNN(3, dropout=0.3, recurrent_dropout=0.3),
            dense(2),
            inputs=(5,),
            dtype="int32",
        ),
        tokens,
    ),
}
if BACKEND != "jax":  # in a traced JAX step Keras refuses unseeded draws
    RANDOM_CASES["unseeded_noise"] = Case(
        sequential(UnseededNoise, dense(2)), regression
    )
