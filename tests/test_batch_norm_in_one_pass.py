"""Batch-norm by the one-pass engine, against the microbatch engine."""

import inspect

import keras
import numpy as np
import pytest
from keras import layers
from marks import quick
from marks import slow_but_on_torch

import keras_stab
from keras_stab import keras_internals
from keras_stab.backend import tracing
from keras_stab.gradients.one_pass.layout import Layout
from keras_stab.gradients.oracle import GradientOracle

pytestmark = pytest.mark.usefixtures("quick_compilation")


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


def answers(model, data, groups, engine):
    """What an engine gives for a batch, as arrays."""
    plans = []

    def ask(data):
        oracle = GradientOracle(model, *data)
        gradients = oracle.group_gradients(groups, engine)
        plans.append(gradients.plan)
        weights = keras.ops.arange(1, groups + 1, dtype="float32") / groups
        outcome = oracle.outcome
        return (
            gradients.gram(),
            [g for g in gradients.combine(weights) if g is not None],
            outcome.loss,
            outcome.y_pred,
            [value for value in outcome.state if value is not None],
        )

    if keras.backend.backend() == "jax":
        import jax

        ask = jax.jit(ask)
    data = keras.tree.map_structure(keras.ops.convert_to_tensor, data)
    with tracing.no_gradients():
        found = ask((*data, None)[:3])
    assert plans[-1].engine == engine
    return keras.tree.map_structure(array, found)


def assert_engines_agree(model, data, groups=3, tolerance=1e-5):
    if not model.compiled:
        model.compile("sgd", "mse")
    keras_internals.build_for(model, data)
    one, other = (
        answers(model, data, groups, engine)
        for engine in ("one_pass", "microbatch")
    )
    names = ("Gram matrix", "gradient", "loss", "outputs", "state")
    for name, mine, theirs in zip(names, one, other):
        mine, theirs = (keras.tree.flatten(part) for part in (mine, theirs))
        assert len(mine) == len(theirs) > 0, name
        largest = max(np.abs(t).max() for t in theirs)
        for a, b in zip(mine, theirs):
            np.testing.assert_allclose(
                a, b, rtol=0, atol=tolerance * max(largest, 1.0), err_msg=name
            )


def randomised(model):
    """Weights and statistics that no initializer gives."""
    rng = np.random.default_rng(3)
    for layer in keras_internals.all_layers(model):
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights(
                [rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()]
            )
    return model


def flat(**options):
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6),
            layers.BatchNormalization(momentum=0.8, **options),
            layers.ReLU(),
            layers.Dense(4),
            layers.BatchNormalization(name="second"),
            layers.Dense(3),
        ]
    )


def images(data_format="channels_last", axis=-1):
    shape = (6, 6, 2) if data_format == "channels_last" else (2, 6, 6)
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.BatchNormalization(axis=axis),
            layers.Conv2D(4, 3, activation="tanh", data_format=data_format),
            layers.BatchNormalization(axis=axis, epsilon=0.1),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def called_twice():
    inputs = keras.Input((5,))
    norm = layers.BatchNormalization(momentum=0.6)
    x = norm(layers.Dense(4)(inputs))
    x = norm(layers.Dense(4, activation="tanh")(x))
    return keras.Model(inputs, layers.Dense(3)(x))


class TrainedThenUsed(keras.Model):
    """The second call reads what the first has stored."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(4), layers.Dense(3)
        self.norm = layers.BatchNormalization(momentum=0.5)

    def call(self, x, training=False):
        x = self.norm(self.first(x), training=training)
        return self.last(self.norm(x * 2.0 + 1.0, training=False))


class Positions(keras.Model):
    """Adds what is the same for all rows before batch-norm."""

    def __init__(self):
        super().__init__()
        self.table, self.last = layers.Embedding(5, 4), layers.Dense(3)
        self.norm, self.first = layers.BatchNormalization(), layers.Dense(4)

    def call(self, x, training=False):
        positions = self.table(keras.ops.arange(5)[None])
        x = self.first(keras.ops.expand_dims(x, -1) + positions)
        x = keras.ops.tanh(self.norm(x, training=training))
        return self.last(keras.ops.sum(x, axis=1))


def nested():
    inner = keras.Sequential(
        [layers.Dense(4), layers.BatchNormalization(momentum=0.7)]
    )
    inputs = keras.Input((5,))
    return keras.Model(inputs, layers.Dense(3)(inner(layers.ReLU()(inputs))))


class Scaled(layers.Layer):
    """Owns a weight besides the layer inside it."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()

    def build(self, shape):
        self.norm.build(shape)
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x, training=False):
        return self.norm(x, training=training) * self.scale


def composite():
    return keras.Sequential(
        [keras.Input((5,)), layers.Dense(4), Scaled(), layers.Dense(3)]
    )


def masked():
    inputs = keras.Input((4,), dtype="int32")
    x = layers.Embedding(5, 3, mask_zero=True)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


class Reshaped(layers.Layer):
    """Other rows of the same elements."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def call(self, x):
        return keras.ops.reshape(x, (-1, self.width))

    def compute_output_shape(self, shape):
        return (None, self.width)


def merged_rows():
    """Batch-norm sees several rows for each row of the batch."""
    inputs = keras.Input((4, 5))
    x = Reshaped(5)(inputs)
    x = layers.BatchNormalization()(layers.Dense(6)(x))
    x = Reshaped(24)(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def middle_axis():
    inputs = keras.Input((4, 5))
    x = layers.BatchNormalization(axis=1)(layers.Dense(6)(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def frozen():
    model = flat()
    model.get_layer("second").trainable = False
    return model


def regularised():
    return flat(gamma_regularizer="l2", beta_regularizer="l1")


MODELS = {
    "flat": flat,
    "without_scale": lambda: flat(scale=False),
    "without_weights": lambda: flat(scale=False, center=False),
    "regularised": regularised,
    "images": images,
    "middle_axis": middle_axis,
    "called_twice": called_twice,
    "trained_then_used": TrainedThenUsed,
    "positions": Positions,
    "nested": nested,
    "composite": composite,
    "masked": masked,
    "merged_rows": merged_rows,
    "frozen": frozen,
}
if keras.backend.backend() == "tensorflow":  # which alone accepts it
    MODELS["synchronized"] = lambda: flat(synchronized=True)
else:  # whose convolutions on CPUs know this format
    MODELS["channels_first"] = lambda: images("channels_first", 1)
EVERYWHERE = {"flat", "images", "called_twice", "masked", "synchronized"}


def rows_for(model, count):
    rng = np.random.default_rng(1)
    inputs = getattr(model, "inputs", None)
    shape = tuple(inputs[0].shape[1:]) if inputs else (5,)
    if inputs and "int" in inputs[0].dtype:
        x = rng.integers(0, 5, (count, *shape)).astype("int32")
    else:
        x = rng.normal(size=(count, *shape)).astype("float32")
    return x, rng.normal(size=(count, 3)).astype("float32")


@pytest.mark.parametrize(
    "name, rows",
    quick(
        [(name, rows) for name in MODELS for rows in (12, 10)],
        lambda case: case[0] in EVERYWHERE and case[1] == 10,
    ),
)
def test_engines_agree(name, rows):
    """In groups of equal and of unequal size."""
    keras.utils.set_random_seed(2)
    model = MODELS[name]()
    data = rows_for(model, rows)
    model(data[0])
    assert_engines_agree(randomised(model), data)


def trained(engine, x, y, policy="float32", **options):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [layers.Dense(4), layers.BatchNormalization(), layers.Dense(3)]
    )
    optimizer = keras_stab.GRAIN(
        keras.optimizers.SGD(0.1), groups=3, engine=engine
    )
    model.compile(optimizer, "mse", **options)
    model.fit(x, y, batch_size=9, shuffle=False, verbose=0)
    return model, optimizer


def data(rows):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 5)).astype("float32")
    return x, rng.normal(size=(rows, 3)).astype("float32")


def test_training_agrees():
    """A last short batch too, of unknown size on TensorFlow."""
    x, y = data(16)
    (one, _), (other, _) = (
        trained(engine, x, y) for engine in ("one_pass", "microbatch")
    )
    for a, b in zip(one.get_weights(), other.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-5)
    _, optimizer = trained("auto", x, y)
    assert optimizer.plan().engine == "one_pass"


def test_a_group_that_is_not_a_number():
    """It is left out, of the moving statistics too."""
    x, y = data(9)
    x[4, 0] = np.nan  # of group 1
    (one, figures), (other, _) = (
        trained(engine, x, y) for engine in ("one_pass", "microbatch")
    )
    assert figures.diagnostics()["weights"][1] == 0
    for a, b in zip(one.get_weights(), other.get_weights()):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    """Moments are taken in single precision."""
    x, y = data(9)
    (one, _), (full, _) = (
        trained("one_pass", x, y, p) for p in (policy, "float32")
    )
    one, full = one.layers[1], full.layers[1]
    for a, b in zip(one.get_weights(), full.get_weights()):
        np.testing.assert_allclose(a, b, atol=2e-2)
    np.testing.assert_allclose(
        one.moving_variance, full.moving_variance, rtol=2e-2
    )


@slow_but_on_torch
def test_thawed_without_weights():
    """The trainable variables do not tell that it now mixes rows."""
    x, y = data(9)
    models = []
    for engine in ("auto", "microbatch"):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                layers.Dense(4),
                layers.BatchNormalization(scale=False, center=False),
                layers.Dense(3),
            ]
        )
        model.layers[1].trainable = False
        optimizer = keras_stab.GRAIN("sgd", groups=3, engine=engine)
        model.compile(optimizer, "mse", run_eagerly=True)
        model.train_on_batch(x, y)
        model.layers[1].trainable = True
        model.train_on_batch(x, y)
        models.append(model)
    for a, b in zip(*(model.get_weights() for model in models)):
        np.testing.assert_allclose(a, b, atol=1e-6)


@slow_but_on_torch
@pytest.mark.parametrize("index", [0, 1])
def test_a_call_set_on_the_instance(index):
    """It is what runs, and it stays."""
    x, y = data(9)
    models = []
    for engine in ("auto", "microbatch"):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(4),
                layers.BatchNormalization(),
                layers.Dense(3),
            ]
        )
        layer = model.layers[index]

        def call(inputs, training=None, own=layer.call, **arguments):
            if "training" in inspect.signature(own).parameters:
                arguments["training"] = training
            return keras.ops.tanh(own(2.0 * inputs, **arguments))

        layer.call = call
        model.compile(keras_stab.GRAIN("sgd", groups=3, engine=engine), "mse")
        model.train_on_batch(x, y)
        assert layer.call is call
        models.append(model)
    for a, b in zip(*(model.get_weights() for model in models)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_shares_are_exact():
    """Moving statistics in float64 are weighted by them."""
    x, y = data(15)
    shares = Layout((x, y, None), 6).shares()
    np.testing.assert_allclose(shares, [0.2] * 3 + [2 / 15] * 3, rtol=1e-15)


def test_groups_of_one_row():
    x, y = data(5)
    with pytest.raises(Exception, match="group of one row"):
        trained("one_pass", x, y)
