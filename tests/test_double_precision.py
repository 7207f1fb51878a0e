"""A float64 model gets its group gradients, and its step, in float64."""

import contextlib

import keras
import numpy as np
import pytest
from layer_cases import CASES
from layer_cases import random_biases
from marks import quick
from reference import min_norm_by_enumeration
from test_one_pass import answer

import keras_stab
from keras_stab import keras_internals
from keras_stab.numerics.ascent import ascent
from keras_stab.numerics.gram_measures import gram_measures

GROUPS = 3
ENGINES = ("one_pass", "microbatch")


@pytest.fixture(autouse=True)
def double_precision():
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        stack.callback(keras.config.set_floatx, keras.config.floatx())
        policy = keras.config.dtype_policy()
        stack.callback(keras.config.set_dtype_policy, policy)
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")  # as in a new process
        yield


def array(tensor):
    value = keras.ops.convert_to_numpy(tensor)
    assert value.dtype == np.float64
    return value


# Elsewhere Keras multiplies matrices, or averages losses, in float32.
EXACT = keras.backend.result_type("float64", "float32") == "float64"
TOLERANCE = 1e-12 if EXACT else 1e-5


class Linear(keras.layers.Layer):
    """A dense layer of sums, which all backends take in float64."""

    def __init__(self, units, kernel_regularizer=None):
        super().__init__()
        self.units, self.regularizer = units, kernel_regularizer

    def build(self, shape):
        self.kernel = self.add_weight(
            shape=(shape[-1], self.units), regularizer=self.regularizer
        )
        self.bias = self.add_weight(shape=(self.units,))

    def call(self, x):
        products = keras.ops.expand_dims(x, -1) * self.kernel
        return keras.ops.sum(products, axis=1) + self.bias


class Network(keras.Model):
    """Dense layers and a loss of Keras's own where these are exact."""

    def __init__(self):
        super().__init__()
        kind = keras.layers.Dense if EXACT else Linear
        self.first = kind(4)
        penalty = keras.regularizers.L2(0.125) if EXACT else None
        self.second = kind(2, kernel_regularizer=penalty)

    def call(self, x):
        hidden = self.first(x)
        return self.second(hidden + 0.2 * hidden * hidden)


class NetworkOfSums(Network):
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        squares = keras.ops.sum(keras.ops.square(y - y_pred))
        return squares / (2.0 * keras.ops.cast(keras.ops.shape(y)[0], y.dtype))


def network():
    keras.utils.set_random_seed(3)
    model = Network() if EXACT else NetworkOfSums()
    model(keras.ops.zeros((1, 3)))
    random_biases(model)
    return model


def data(rows):
    rng = np.random.default_rng(rows)
    return rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))


def gradients_by_hand(weights, x, y):
    """Of the mean squared error and the penalty, on these rows."""
    first, offset, second, last = weights
    before = x @ first + offset
    hidden = before + 0.2 * before**2
    error = 2.0 * (hidden @ second + last - y) / y.size
    back = (error @ second.T) * (1.0 + 0.4 * before)
    return [
        x.T @ back,
        back.sum(axis=0),
        hidden.T @ error + (0.25 * second if EXACT else 0.0),
        error.sum(axis=0),
    ]


def groups_by_hand(weights, x, y, groups):
    return [
        gradients_by_hand(weights, x[k::groups], y[k::groups])
        for k in range(groups)
    ]


def gram_by_hand(gradients):
    flat = np.stack(
        [np.concatenate([g.ravel() for g in part]) for part in gradients]
    )
    return flat @ flat.T


@pytest.mark.parametrize("rows", [12, 8])
@pytest.mark.parametrize("engine", ENGINES)
def test_group_gradients(engine, rows):
    model = network()
    model.compile("sgd", "mse")
    keras_internals.build_for(model, data(rows))
    weights = np.array([0.2, 0.5, 0.3])
    gram, combined, *_ = answer(model, data(rows), GROUPS, engine, weights)
    by_hand = groups_by_hand(model.get_weights(), *data(rows), GROUPS)
    expected = gram_by_hand(by_hand)
    np.testing.assert_allclose(array(gram), expected, rtol=1e-12)
    for one, *parts in zip(combined, *by_hand):
        expected = sum(w * part for w, part in zip(weights, parts))
        np.testing.assert_allclose(array(one), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_of_fit(engine):
    """With a short batch at the end, whose length TensorFlow leaves open."""
    model = network()
    optimizer = keras_stab.GRAIN(
        keras.optimizers.SGD(0.1), groups=GROUPS, engine=engine
    )
    model.compile(optimizer, "mse")
    weights = model.get_weights()
    x, y = data(20)
    model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0)
    for start in (0, 12, 0, 12):
        part = slice(start, start + 12)
        by_hand = groups_by_hand(weights, x[part], y[part], GROUPS)
        shares = min_norm_by_enumeration(gram_by_hand(by_hand))
        weights = [
            w - 0.1 * sum(s * g for s, g in zip(shares, parts))
            for w, *parts in zip(weights, *by_hand)
        ]
    for one, two in zip(model.get_weights(), weights):
        np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("groups, width", [(1, 3), (2, 3), (4, 9), (6, 3)])
def test_min_norm_weights(groups, width):
    """With fewer dimensions than groups some weights vanish."""
    rng = np.random.default_rng(groups)
    vectors = rng.normal(size=(groups, width)) + 0.5
    gram = vectors @ vectors.T
    solution = keras_stab.min_norm_weights(keras.ops.convert_to_tensor(gram))
    weights = array(solution.weights)
    expected = keras_stab.min_norm_weights(gram)
    direction = weights @ vectors
    np.testing.assert_allclose(
        direction, expected.weights @ vectors, rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(
        array(solution.norm_squared), expected.norm_squared, rtol=1e-11
    )
    figures = gram_measures(
        keras.ops.convert_to_tensor(gram),
        solution,
        keras.ops.ones((groups,), "bool"),
        keras.ops.convert_to_tensor(12.0, "float32"),
    )
    by_hand = gram_measures(gram, expected, np.ones(groups, bool), 12.0)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(figures), by_hand, rtol=1e-4, atol=1e-6
    )


AGREEING = (
    "attention",
    "large_embedding",
    "tied",
    "lora_dense",
    "lora_embedding",
    "convolution_2d",
    "layer_norm",
    "group_norm",
    "regularised",
    "lstm",
    "two_outputs",
)


@pytest.mark.parametrize(
    "name",
    quick(
        [name for name in AGREEING if name in CASES],
        lambda name: name in ("large_embedding", "tied", "lora_embedding"),
    ),
)
def test_engines_agree(name, quick_compilation):
    build, make = CASES[name]
    keras.utils.set_random_seed(1)
    model = build()
    random_biases(model)
    model.compile("sgd", "mse")
    batch = make(7), np.random.default_rng(5).normal(size=(7, 3))
    keras_internals.build_for(model, batch)
    weights = np.array([0.2, 0.5, 0.3])
    answers = [answer(model, batch, GROUPS, e, weights)[:2] for e in ENGINES]
    (gram, combined), (other_gram, others) = answers
    # Keras keeps low-rank adapters in float32.
    tolerance = 1e-5 if "lora" in name else TOLERANCE
    both = keras.ops.convert_to_numpy
    scale = np.abs(both(other_gram)).max()
    np.testing.assert_allclose(
        both(gram), both(other_gram), atol=tolerance * scale
    )
    for one, two in zip(combined, others):
        assert (one is None) == (two is None)
        if one is not None:
            np.testing.assert_allclose(
                both(one), both(two), atol=tolerance * max(scale**0.5, 1.0)
            )


def test_perturbation_of_mixed_precisions():
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2, 3)), rng.normal(size=(4,))
    gradients = [
        keras.ops.convert_to_tensor(first),
        keras.ops.convert_to_tensor(second, "float32"),
    ]
    radius = keras.ops.convert_to_tensor(0.5, "float32")
    (one, two), factor, _ = ascent(gradients, [1.0, 1.0], radius)
    one, two = (keras.ops.cast(factor, t.dtype) * t for t in (one, two))
    length = np.sqrt(np.sum(first**2) + np.sum(second.astype("float32") ** 2.0))
    np.testing.assert_allclose(array(one), 0.5 * first / length, rtol=1e-7)
    assert keras.backend.standardize_dtype(two.dtype) == "float32"
