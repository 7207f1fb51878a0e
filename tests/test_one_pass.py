"""The one-pass engine against the microbatch engine."""

import gc
import re

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import layers
from layer_cases import CASES
from layer_cases import random_biases
from marks import quick
from marks import slow_but_on_torch

import keras_stab
from keras_stab import keras_internals
from keras_stab.backend import costs
from keras_stab.backend import differentiation
from keras_stab.backend import tracing
from keras_stab.gradients.one_pass import layer_rules
from keras_stab.gradients.one_pass import work
from keras_stab.gradients.one_pass.layer_calls import LayerCall
from keras_stab.gradients.one_pass.rules import convolutions
from keras_stab.gradients.oracle import GradientOracle

pytestmark = pytest.mark.usefixtures("quick_compilation")


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float32")


def tensors(data):
    return keras.tree.map_structure(
        lambda leaf: (
            None if leaf is None else keras.ops.convert_to_tensor(leaf)
        ),
        data,
    )


def answer(model, data, groups, engine, weights):
    """Gram matrix, combination, plan, loss and outputs, without a step."""
    plans = []

    def ask(data, weights):
        oracle = GradientOracle(model, *data)
        gradients = oracle.group_gradients(groups, engine)
        plans.append(gradients.plan)
        outcome = oracle.outcome
        return (
            gradients.gram(),
            gradients.combine(weights),
            outcome.loss,
            outcome.y_pred,
        )

    if keras.backend.backend() == "jax":  # one compilation, not one an op
        import jax

        ask = jax.jit(ask)
    data = (*tensors(data), None)[:3]
    with tracing.no_gradients():
        results = ask(data, keras.ops.convert_to_tensor(weights))
    return *results, plans[0]


def assert_engines_agree(model, data, groups, tolerance=1e-4):
    if not model.compiled:
        model.compile("sgd", "mse")
    keras_internals.build_for(model, data)
    weights = np.linspace(0.1, 1.0, groups).astype("float32")
    weights /= weights.sum()
    gram, combined, loss, y_pred, plan = answer(
        model, data, groups, "one_pass", weights
    )
    other_gram, other, other_loss, other_y_pred, _ = answer(
        model, data, groups, "microbatch", weights
    )
    gram, other_gram = array(gram), array(other_gram)
    scale = np.abs(other_gram).max()
    np.testing.assert_allclose(gram, other_gram, atol=tolerance * scale)
    largest = max(np.abs(array(g)).max() for g in other if g is not None)
    for variable, one, two in zip(model.trainable_variables, combined, other):
        if two is None:
            assert one is None, variable.path
            continue
        two = array(two)
        np.testing.assert_allclose(
            array(one),
            two,
            # Some gradients vanish but for rounding: keys of attention.
            atol=tolerance * np.abs(two).max() + 1e-6 * max(largest, 1.0),
            err_msg=variable.path,
        )
    np.testing.assert_allclose(
        float(loss), float(other_loss), rtol=1e-5, atol=1e-6
    )
    for one, two in zip(
        keras.tree.flatten(y_pred), keras.tree.flatten(other_y_pred)
    ):
        np.testing.assert_allclose(array(one), array(two), atol=1e-5)
    solved, expected = (
        array(
            keras_stab.min_norm_weights(keras.ops.convert_to_tensor(g)).weights
        )
        for g in (gram, other_gram)
    )
    direction, reference = (w @ other_gram for w in (solved, expected))
    np.testing.assert_allclose(direction, reference, atol=1e-4 * scale)
    return plan


# Without a matrix there is one form only: groups of unequal size will do.
VECTORS_ONLY = {
    "convolution_grouped",
    "depthwise",
    "separable",
    "transposed",
    "rms_norm",
    "group_norm",
    "lstm",
    "bidirectional",
    "time_distributed",
    "two_outputs",
    "first_unused",
    "embedding",
    "shared_embedding",
    "lora_convolution",
    "dense_with_layer_activation",
    "dense_with_trained_activation",
}
# Much like another case, and long to compile.
LIKE_OTHERS = {
    "bidirectional",
    "grouped_attention",
    "convolution_1d",
    "convolution_3d",
    "convolution_dilated",
    "shared_convolution",
    "separable",
    "lora_convolution",
    "lora_einsum_contracted",
    "einsum_heads",
    "einsum_transposed",
    "tied_twice",
}
AGREEING = [(name, 7, "store") for name in CASES] + [
    (name, 12, "ghost") for name in CASES if name not in VECTORS_ONLY
]


@pytest.mark.parametrize(
    "name, rows, form",
    quick(
        AGREEING,
        lambda case: (
            case[0] not in LIKE_OTHERS
            if case[2] == "store"
            else case[0] in ("dense", "attention")
        ),
    ),
)
def test_engines_agree(name, rows, form, monkeypatch):
    """In groups of equal and of unequal size, in either form."""
    monkeypatch.setattr(work, "cheaper_form", lambda *_: form)
    build, data = CASES[name]
    keras.utils.set_random_seed(2)
    model = random_biases(build())
    x = data(rows)
    y = np.random.default_rng(5).normal(size=(rows, 3)).astype("float32")
    assert_engines_agree(model, (x, y), groups=3)


def small_model(*middle, shape=(5,), head=3):
    return keras.Sequential(
        [
            layers.Input(shape),
            layers.Dense(6, activation="tanh", name="first"),
            *middle,
            layers.Dense(head, name="last"),
        ]
    )


def small_data(rows=12, features=5, targets=3):
    rng = np.random.default_rng(rows)
    return (
        rng.normal(size=(rows, features)).astype("float32"),
        rng.normal(size=(rows, targets)).astype("float32"),
    )


# ---- Shapes ---------------------------------------------------------------


@st.composite
def one_layer(draw):
    """A layer with made-up shapes, and the shape of a row of its input."""
    size = st.integers(1, 5)
    kind = draw(st.sampled_from(["dense", "einsum", "convolution", "norm"]))
    features, units = draw(size), draw(size)
    length = draw(st.integers(1, 4))
    if kind == "dense":
        rest = draw(st.lists(size, max_size=2))
        use_bias = draw(st.booleans())
        return layers.Dense(units, use_bias=use_bias), (*rest, features)
    if kind == "einsum":
        equation, output_shape, bias_axes = draw(
            st.sampled_from(
                [
                    ("abc,cde->abde", (None, units, 2), "de"),
                    ("abc,cde->abde", (None, units, 2), "d"),
                    ("abc,bd->adc", (units, features), None),
                    ("abc,bcd->abd", (length, units), "bd"),
                    ("abc,cb->abc", (length, features), "c"),
                    ("abc,bcd->ad", (units,), "d"),
                ]
            )
        )
        layer = layers.EinsumDense(equation, output_shape, bias_axes=bias_axes)
        return layer, (length, features)
    if kind == "convolution":
        strides = draw(st.integers(1, 2))
        # Never 1x1 with strides: the ordinary gradient of PyTorch, to compare
        # with, then writes past its memory on some processors.
        layer = layers.Conv2D(
            units,
            (draw(st.integers(strides, 3)), draw(st.integers(1, 2))),
            strides=strides,
            padding=draw(st.sampled_from(["valid", "same"])),
            dilation_rate=draw(st.integers(1, 2)) if strides == 1 else 1,
        )
        return layer, (5 + length, 3 + length, features)
    axis = draw(st.sampled_from([-1, [1, 2]]))
    # Of a single feature nothing is left but rounding.
    return layers.LayerNormalization(axis=axis), (length, features + 1)


@slow_but_on_torch
@settings(max_examples=12, deadline=None)
@given(
    one_layer(),
    # PyTorch fails to differentiate one filter for a single row.
    st.integers(8, 13),
    st.integers(2, 4),
    st.sampled_from(["ghost", "store"]),
)
def test_made_up_shapes(layer_and_shape, rows, groups, form):
    layer, shape = layer_and_shape
    inputs = keras.Input(shape)
    outputs = layers.Flatten()(layer(inputs))
    model = random_biases(keras.Model(inputs, keras.ops.tanh(outputs)))
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, *shape)).astype("float32")
    targets = model(x).shape[1]
    y = rng.normal(size=(rows, targets)).astype("float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "cheaper_form", lambda *_: form)
        assert_engines_agree(model, (x, y), groups)


@slow_but_on_torch
def test_a_kernel_of_one_position(monkeypatch):
    """Its K gradients are one product of matrices, in either form."""

    def refuse(*_):
        raise AssertionError("a convolution is differentiated")

    monkeypatch.setattr(work, "cheaper_form", lambda *_: "store")
    monkeypatch.setattr(convolutions, "_convolve", refuse)
    layer = layers.Conv2D(4, 1, strides=2)
    # Strides that reach the last column: safe in every PyTorch.
    model = random_biases(keras.Sequential([layers.Input((7, 5, 3)), layer]))
    rng = np.random.default_rng(3)
    x = rng.normal(size=(7, 7, 5, 3)).astype("float32")
    y = rng.normal(size=(7, 4, 3, 4)).astype("float32")
    assert_engines_agree(model, (x, y), groups=3)


@slow_but_on_torch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_filter_and_one_row(dtype, monkeypatch):
    """PyTorch itself cannot differentiate it, for one row or in float64."""
    monkeypatch.setattr(work, "cheaper_form", lambda *_: "store")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 5, 4, 2))
    y = rng.normal(size=(3, 3, 3, 1))
    kernel = keras.random.normal((3, 2, 2, 1), seed=1)
    grams = []
    for filters in (1, 2):  # of two filters, the second is always right
        keras.config.set_dtype_policy(dtype)
        model = keras.Sequential([layers.Input((5, 4, 2))])
        model.add(layers.Conv2D(filters, (3, 2), use_bias=False))
        weight = keras.ops.repeat(kernel, filters, axis=-1)
        model.layers[0].kernel.assign(weight)
        targets = keras.ops.convert_to_numpy(model(x)).copy()
        targets[..., :1] = y
        model.compile("sgd", keras.losses.MeanSquaredError("sum"))
        weights = np.full(3, 1 / 3, "float32")
        gram, *_ = answer(model, (x, targets), 3, "one_pass", weights)
        grams.append(array(gram) * filters**2)
    np.testing.assert_allclose(*grams, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_a_bias_that_keras_adds_elsewhere(shape):
    """Keras 3.15 on TensorFlow adds it along an axis of the same length."""
    layer = layers.EinsumDense("abc,cde->abde", (None, *shape), bias_axes="d")
    inputs = keras.Input((3, 1))
    outputs = keras.ops.tanh(layers.Flatten()(layer(inputs)))
    model = random_biases(keras.Model(inputs, outputs))
    rng = np.random.default_rng(4)
    x = rng.normal(size=(4, 3, 1)).astype("float32")
    y = rng.normal(size=model(x).shape).astype("float32")
    assert_engines_agree(model, (x, y), 2)


# ---- Losses ---------------------------------------------------------------


def own_loss(y, y_pred):
    return keras.ops.mean(keras.ops.square(y - y_pred) * y_pred)


LOSSES = {
    "row_wise": "mse",
    "object": keras.losses.CosineSimilarity(),
    "across_rows": keras.losses.Dice(),
    "own": own_loss,
    "weighted_mean": keras.losses.MeanSquaredError("mean_with_sample_weight"),
    "sum": keras.losses.MeanAbsoluteError("sum"),
}


@pytest.mark.parametrize("rows", [12, 7])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, rows):
    model = random_biases(small_model())
    model.compile("sgd", LOSSES[loss])
    weights = np.linspace(0.2, 2.0, rows).astype("float32")
    assert_engines_agree(model, (*small_data(rows), weights), groups=3)


def test_row_wise_losses_are_evaluated_once():
    """And one that is not, once a group."""
    calls = {}
    compute_loss = keras_internals.compute_loss
    for loss in ("mse", own_loss):
        model = small_model()
        model.compile(keras_stab.GRAIN("sgd", engine="one_pass"), loss)
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                keras_internals,
                "compute_loss",
                lambda *a, seen=seen: seen.append(1) or compute_loss(*a),
            )
            model.fit(*small_data(), batch_size=12, verbose=0)
        calls[loss] = len(seen)
    assert calls[own_loss] == 4 * calls["mse"] > 0


def test_masks_of_the_outputs():
    inputs = keras.Input((4,), dtype="int32")
    x = layers.Embedding(7, 5, mask_zero=True)(inputs)
    x = layers.LSTM(3, return_sequences=True)(x)
    model = random_biases(keras.Model(inputs, layers.Dense(3)(x)))
    rng = np.random.default_rng(1)
    x = rng.integers(0, 7, (7, 4)).astype("int32")
    x[:, 0] = 1  # no row without a token
    y = rng.normal(size=(7, 4, 3)).astype("float32")
    assert_engines_agree(model, (x, y), groups=3)


def test_several_outputs_and_their_metrics():
    inputs = keras.Input((5,), name="x")
    hidden = layers.Dense(6, activation="tanh")(inputs)
    outputs = {
        "a": layers.Dense(3, name="a")(hidden),
        "b": layers.Dense(3, name="b")(hidden),
    }
    histories = []
    for engine in ("one_pass", "microbatch"):
        keras.utils.set_random_seed(1)
        model = keras.models.clone_model(keras.Model(inputs, outputs))
        model.compile(
            keras_stab.GRAIN(keras.optimizers.SGD(0.05), engine=engine),
            loss={"a": "mse", "b": own_loss},
            loss_weights={"a": 0.3, "b": 1.0},
            metrics={"a": "mae", "b": "mse"},
        )
        x, y = small_data()
        history = model.fit(
            x,
            {"a": y, "b": y[:, ::-1].copy()},
            batch_size=6,
            epochs=2,
            shuffle=False,
            verbose=0,
        )
        histories.append(history.history)
    assert histories[0].keys() == histories[1].keys()
    for key, values in histories[0].items():
        np.testing.assert_allclose(values, histories[1][key], rtol=1e-4)


# ---- What is refused ------------------------------------------------------


class RowMean(layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


class TimeMajor(layers.Layer):
    """Sums over pairs of tokens that belong to different rows."""

    def call(self, x):
        shape = x.shape
        x = keras.ops.reshape(keras.ops.swapaxes(x, 0, 1), (-1, shape[2]))
        return keras.ops.reshape(x, (-1, shape[1], shape[2]))


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x))
        return x


class OwnWeight(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.scale = self.add_weight(shape=(3,), name="scale")

    def call(self, x):
        return self.dense(x) * self.scale


class ReadsElsewhere(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(5, name="tied")

    def call(self, x):
        return keras.ops.matmul(self.dense(x), self.dense.kernel)[:, :3]


def squared_error(y, y_pred):
    return keras.ops.mean(keras.losses.mean_squared_error(y, y_pred))


class OwnPenalty(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, kernel_regularizer="l2", name="decayed")

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return squared_error(y, y_pred) + 2 * sum(self.losses)


class PenaltyInLoss(OwnPenalty):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, name="read_by_the_loss")

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        penalty = keras.ops.sum(keras.ops.square(self.dense.kernel))
        return squared_error(y, y_pred) + penalty


class OwnNorm(layers.BatchNormalization):
    def __init__(self):
        super().__init__(name="own")

    def call(self, inputs, training=None, mask=None):
        return 2.0 * super().call(inputs, training=training, mask=mask)


def sequence_model(middle):
    inputs = keras.Input((4, 5))
    x = layers.Dense(6, name="first")(middle(inputs))
    return keras.Model(inputs, _pooled(layers.Dense(3, name="last")(x)))


def _pooled(x):
    return layers.GlobalAveragePooling1D()(x)


def rematerialised():
    with keras.RematScope(mode="full"):
        return small_model()


REFUSED = {
    "renorm": (
        lambda: small_model(layers.BatchNormalization(renorm=True)),
        "statistics of the whole batch",
    ),
    "own_batch_norm": (lambda: small_model(OwnNorm()), "'own'.*whole batch"),
    "batch_norm_in_a_loop": (
        lambda: sequence_model(
            layers.TimeDistributed(layers.BatchNormalization())
        ),
        "statistics of the whole batch",
    ),
    "row_mean": (lambda: small_model(RowMean()), "'last'.*other rows"),
    "mixed_output": (
        lambda: keras.Sequential([small_model(), RowMean()]),
        "output of the model.*other rows",
    ),
    "time_major": (lambda: sequence_model(TimeMajor()), "'first'.*other rows"),
    "add_loss": (lambda: small_model(AddsLoss()), "add_loss"),
    "activity": (
        lambda: small_model(layers.Dense(3, activity_regularizer="l2")),
        "activity regulariser",
    ),
    "own_weight": (OwnWeight, "scale.*belongs to the model"),
    "reads_elsewhere": (ReadsElsewhere, "tied/kernel.*outside"),
    "own_penalty": (OwnPenalty, "decayed/kernel"),
    "penalty_in_loss": (PenaltyInLoss, "read_by_the_loss/kernel.*outside"),
    "spectral": (
        lambda: small_model(layers.SpectralNormalization(layers.Dense(3))),
        "rewrites the weights",
    ),
    "random_lstm": (
        lambda: sequence_model(
            layers.LSTM(5, dropout=0.5, return_sequences=True, name="drops")
        ),
        "'drops' draws random numbers",
    ),
}
if keras.backend.backend() != "tensorflow":  # where Keras cannot build it
    REFUSED["rematerialised"] = (rematerialised, "RematScope")


def data_for(model):
    x, y = small_data()
    if getattr(model, "input_shape", (None, 5)) != (None, 5):
        x = np.repeat(x[:, None], 4, axis=1)
    return x, y


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, message = REFUSED[name]
    model = build()
    x, y = data_for(model)
    optimizer = keras_stab.GRAIN("sgd", engine="one_pass")
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match=message) as caught:
        model.train_on_batch(x, y)
    assert 'Use engine="auto"' in str(caught.value)
    optimizer = keras_stab.GRAIN("sgd")
    model = build()
    model.compile(optimizer, "mse")
    model.train_on_batch(x, y)
    plan = optimizer.plan()
    assert plan.engine == "microbatch"
    assert re.search(message, plan.reason)


def test_frozen_batch_norm_is_not_refused():
    norm = layers.BatchNormalization()
    model = small_model(norm)
    norm.trainable = False
    assert_engines_agree(model, small_data(), groups=3)


def test_layers_are_left_as_they_were():
    model = small_model()
    model.compile(keras_stab.GRAIN("sgd", engine="one_pass"), own_loss)
    before = [dict(vars(layer)) for layer in model.layers]
    model.train_on_batch(*small_data())
    for layer, attributes in zip(model.layers, before):
        assert "call" not in vars(layer)
        assert layer.activation is attributes["activation"]


# ---- Training -------------------------------------------------------------


def trained(engine, policy="float32", loss="mse", rows=12, steps=3, x=None):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(1)
    model = small_model(layers.LayerNormalization(), layers.Dense(4))
    optimizer = keras_stab.GRAIN(
        keras.optimizers.SGD(0.05), groups=3, engine=engine
    )
    model.compile(optimizer, loss)
    data, y = small_data(rows)
    x = data if x is None else x
    model.fit(x, y, batch_size=8, epochs=steps, shuffle=False, verbose=0)
    return model, optimizer


@pytest.mark.parametrize("rows", [16, 13])
def test_training_agrees(rows):
    """A last short batch too, of unknown size on TensorFlow."""
    (one, _), (other, _) = (trained(e, rows=rows) for e in ENGINES)
    for a, b in zip(one.get_weights(), other.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    quick(
        ["large_embedding", "attention", "convolution_2d", "lora_einsum"],
        lambda name: name in ("attention", "convolution_2d"),
    ),
)
def test_layers_in_training(name):
    """With a batch of unknown size on TensorFlow."""
    build, data = CASES[name]
    y = np.random.default_rng(5).normal(size=(11, 3)).astype("float32")
    weights = []
    for engine in ENGINES:
        keras.utils.set_random_seed(2)
        model = random_biases(build())
        optimizer = keras_stab.GRAIN(
            keras.optimizers.SGD(0.1), groups=3, engine=engine
        )
        model.compile(optimizer, "mse")
        model.fit(data(11), y, batch_size=7, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights):
        np.testing.assert_allclose(one, other, atol=1e-5)


ENGINES = ("one_pass", "microbatch")


class Lengths(keras.utils.PyDataset):
    """Batches of sequences, another length in each."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        x = rng.integers(0, 9, (3, 3 + index % 3)).astype("int32")
        return x, rng.normal(size=(3, 3)).astype("float32")


def test_rows_of_unknown_length():
    """On TensorFlow nothing but their rank is known while tracing."""
    weights = []
    for engine in ("auto", "microbatch"):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((None,), dtype="int32")
        x = layers.Dense(5, "tanh")(layers.Embedding(9, 4)(inputs))
        model = keras.Model(inputs, layers.Dense(3)(_pooled(x)))
        optimizer = keras_stab.GRAIN(
            keras.optimizers.SGD(0.1), groups=2, engine=engine
        )
        model.compile(optimizer, "mse")
        model.fit(Lengths(), shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_bfloat16():
    _, mixed = trained("one_pass", "mixed_bfloat16", rows=8, steps=1)
    _, full = trained("one_pass", rows=8, steps=1)
    np.testing.assert_allclose(
        mixed.diagnostics()["weights"],
        full.diagnostics()["weights"],
        atol=1e-2,
    )


def test_float16_under_a_loss_scale():
    model, optimizer = trained("one_pass", "mixed_float16", rows=8, steps=1)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    _, full = trained("one_pass", rows=8, steps=1)
    np.testing.assert_allclose(
        optimizer.diagnostics()["weights"],
        full.diagnostics()["weights"],
        atol=2e-2,
    )


@pytest.mark.parametrize("form", ["ghost", "store"])
def test_a_row_that_is_not_a_number(form, monkeypatch):
    monkeypatch.setattr(work, "cheaper_form", lambda *_: form)
    x, _ = small_data(8)
    x[4, 0] = np.nan  # of group 1
    answers = []
    for engine in ENGINES:
        model, optimizer = trained(engine, rows=8, steps=1, x=x)
        figures = optimizer.diagnostics()
        assert figures["nonfinite"] == 1 and figures["weights"][1] == 0
        answers.append(model.get_weights())
    for a, b in zip(*answers):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_forward_pass():
    """Each layer runs once in a step, however many groups there are."""
    calls = []

    class Counted(layers.Layer):
        def call(self, x):
            calls.append(1)
            return x

    model = small_model(Counted())
    model.compile(
        keras_stab.GRAIN("sgd", engine="one_pass"), "mse", run_eagerly=True
    )
    x, y = small_data()
    model.train_on_batch(x, y)
    calls.clear()
    model.train_on_batch(x, y)
    assert len(calls) == (2 if keras.backend.backend() == "jax" else 1)


if keras.backend.backend() == "torch":
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from keras_stab.backend import together

    class Reads(TorchDispatchMode):
        """Counts the operations for which the host waits for a device."""

        NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in self.NAMES:
                self.seen.append(name)
            return function(*args, **(kwargs or {}))

    @pytest.mark.parametrize("rows", [12, 7])
    def test_the_inner_products_alone_are_read(rows):
        model, optimizer = trained("one_pass")
        oracle = GradientOracle(model, *tensors(small_data(rows)))
        with torch.no_grad(), Reads() as reads:
            optimizer.estimate(oracle)
        assert not reads.seen

    def test_no_tensor_outlives_a_step():
        """Otherwise the next step could not have its memory."""
        model, _ = trained("one_pass")
        data = tensors(small_data())
        model.train_step(data)
        gc.collect()
        gc.disable()
        try:
            kinds = []
            for _ in range(2):
                model.train_step(data)
                kinds.append(list(map(type, gc.get_objects())))
        finally:
            gc.enable()
        before, after = (each.count(torch.Tensor) for each in kinds)
        assert after <= before + 2

    @pytest.mark.parametrize("shape", [(5, 32), (8, 32), (3, 200), (4, 3)])
    def test_token_products_in_strips(shape):
        generator = np.random.default_rng(1)
        factors = [
            [torch.tensor(generator.standard_normal((*shape, d))) for d in pair]
            for pair in ((3, 2), (4, 5))
        ]
        expected = np.zeros((shape[0], shape[0]))
        for left, right in factors:
            stack = (left.mT @ right).reshape(shape[0], -1)
            expected += (stack @ stack.T).numpy()
        gram = together.token_grams(factors)
        np.testing.assert_allclose(gram, expected, rtol=1e-10)

    class Fixed(layers.Layer):
        """A layer without a rule; `reads` decides as its inputs do."""

        def __init__(self, reads):
            super().__init__()
            self.reads = reads

        def build(self, shape):
            self.scale = self.add_weight(shape=shape[-1:], initializer="ones")
            self.unused = self.add_weight(shape=shape[-1:])

        def call(self, x):
            # At the point where PyTorch would have to know all groups.
            if self.reads and float(keras.ops.sum(x)) > 1e9:
                return x
            return keras.ops.tanh(x * self.scale)

    @pytest.mark.parametrize("reads", [False, True])
    @pytest.mark.parametrize("rows", [12, 13])
    def test_a_layer_without_a_rule_runs_once(reads, rows, monkeypatch):
        """On groups of one size, where it does not read its inputs."""
        calls, layer = [], Fixed(reads)
        rerun = LayerCall.rerun
        monkeypatch.setattr(
            LayerCall,
            "rerun",
            lambda *args: calls.append(1) or rerun(*args),
        )
        model = small_model(layer)
        assert_engines_agree(model, small_data(rows), groups=3)
        calls.clear()
        answer(model, small_data(rows), 3, "one_pass", np.ones(3, "float32"))
        assert len(calls) == (1 if rows == 12 and not reads else 3)


# ---- Rules and plans ------------------------------------------------------


class Scaled(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones")
        self.shift = self.add_weight(shape=shape[-1:], name="shift")

    def call(self, x):
        return x * self.scale + self.shift


def test_a_registered_rule(monkeypatch):
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))
    used = []

    @keras_stab.register_layer_rule(Scaled)
    def rule(layer, call):
        used.append(layer)
        product = call.grouped(call.gradient * call.args[0])
        answer = [(layer.scale, keras.ops.sum(product, axis=1))]
        if complete:
            shift = keras.ops.sum(call.grouped(call.gradient), axis=1)
            answer.append((layer.shift, shift))
        return answer

    for complete in (True, False):  # what a rule leaves out is found anyway
        used.clear()
        assert_engines_agree(small_model(Scaled()), small_data(), groups=3)
        assert used


def test_a_rule_is_not_used_for_another_call():
    class Doubled(layers.Dense):
        def call(self, x):
            return 2 * super().call(x)

    class Renamed(layers.Dense):
        pass

    assert layer_rules.find_rule(Doubled(3))[0] is layer_rules.generic_rule
    assert layer_rules.find_rule(Renamed(3))[0] is not layer_rules.generic_rule
    assert_engines_agree(small_model(Doubled(4)), small_data(), groups=3)


def test_a_rule_for_no_layer():
    with pytest.raises(TypeError, match="subclass of keras.layers.Layer"):
        keras_stab.register_layer_rule(int)


def test_plan(capsys):
    optimizer = keras_stab.GRAIN("sgd", groups=2)
    model = small_model(layers.LayerNormalization(), head=3)
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="no plan before the first step"):
        optimizer.plan()
    weights = model.get_weights()
    plan = optimizer.plan(model, *small_data())
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)
    assert plan.engine == "one_pass"
    paths = [path for path, _ in plan.works]
    assert paths == [v.path for v in model.trainable_variables]
    assert capsys.readouterr().out == ""  # `print(...)` is the user's
    shown = str(plan)
    assert repr(plan) == shown
    assert "first/kernel" in shown and "one_pass" in shown
    eager = keras.backend.backend() == "torch"
    assert plan.host_reads == eager
    assert f"reads of the host in a step: {plan.host_reads}" in shown
    first = dict(plan.works)[paths[0]]
    assert (first.tokens, first.inputs, first.outputs) == (12, 5, 6)
    assert first.ordinary == 3 * 12 * 5 * 6
    assert plan.bytes > 0 and plan.extra_work > 0
    assert plan.step_ratio > 1
    assert f"predicted time of a step: {plan.step_ratio:.2f}" in shown
    model.fit(*small_data(), batch_size=12, verbose=0)
    assert optimizer.plan().works == plan.works
    assert optimizer.plan().step_ratio == plan.step_ratio


def test_costs_are_counted():
    """The same for every run; what nothing depends on is left out."""
    x, weights = (
        keras.ops.convert_to_tensor(np.ones(shape, "float32"))
        for shape in ((6, 5), (5, 3))
    )

    def function(tensors):
        x, weights = tensors
        if keras.backend.backend() != "torch":  # which runs it all the same
            keras.ops.matmul(keras.ops.transpose(x), x)
        return [keras.ops.matmul(x, weights)]

    cost = costs.cost_of(function, [x, weights])
    assert cost.multiply_adds == 6 * 5 * 3
    assert cost.operations == 1
    assert cost.bytes == 4 * (6 * 5 + 5 * 3 + 6 * 3)
    assert cost == costs.cost_of(function, [x, weights])


@slow_but_on_torch
@pytest.mark.parametrize("layer", [layers.Conv2D, layers.DepthwiseConv2D])
def test_costs_of_convolutions(layer):
    options = {"padding": "same", "use_bias": False}
    if layer is layers.Conv2D:
        options["filters"] = 3
    convolve = layer(kernel_size=(3, 2), **options)
    x = keras.ops.ones((4, 8, 8, 3))
    convolve.build(x.shape)
    values = [tracing.read(v) for v in convolve.trainable_variables]

    def gradients(values):
        def loss(values):
            scope = keras.StatelessScope(
                zip(convolve.trainable_variables, values)
            )
            with scope:
                return keras.ops.sum(keras.ops.square(convolve(x))), None

        return differentiation.value_and_gradients(loss, values)[1]

    inputs = 1 if layer is layers.DepthwiseConv2D else 3
    forward = 4 * 8 * 8 * 3 * 3 * 2 * inputs
    assert costs.cost_of(gradients, values).multiply_adds == 2 * forward


def test_a_wide_layer_is_not_stored():
    model = small_model(layers.Dense(700), layers.Dense(700))
    optimizer = keras_stab.GRAIN("sgd")
    model.compile(optimizer, "mse")
    works = dict(optimizer.plan(model, *small_data(16)).works)
    choices = {path.split("/", 1)[1]: w.choice for path, w in works.items()}
    wide = model.layers[2].kernel.path.split("/", 1)[1]
    assert choices[wide] == "ghost"


def test_many_tokens_go_in_small_batches():
    """But not where every operation has to be dispatched by itself."""
    model = sequence_model(layers.Dense(5))
    optimizer = keras_stab.GRAIN("sgd", groups=2)
    model.compile(optimizer, "mse")
    x = np.ones((64, 4, 5), "float32")
    plan = optimizer.plan(model, x, np.ones((64, 3), "float32"))
    if keras.backend.backend() == "torch":
        assert plan.engine == "one_pass" and "dispatch" in plan.reason
    else:
        assert plan.engine == "microbatch" and "less memory" in plan.reason


def test_no_plan_for_plain_gradients():
    optimizer = keras_stab.GRAIN("sgd", across="batches")
    with pytest.raises(ValueError, match="nothing to plan"):
        optimizer.plan()


# ---- KerasHub -------------------------------------------------------------


@slow_but_on_torch
def test_keras_hub_language_model():
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=11,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        dropout=0.0,
        max_sequence_length=6,
    )
    model = random_biases(keras_hub.models.GPT2CausalLM(backbone))
    model.preprocessor = None
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 11, (7, 5)).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    weights = rng.uniform(0.5, 1.5, (7, 5)).astype("float32")
    plan = assert_engines_agree(model, (x, ids, weights), groups=3)
    choices = {path for path, _ in plan.works}
    assert any("position_embedding" in path for path in choices)


@slow_but_on_torch
def test_keras_hub_low_rank_adapters():
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=11,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
    )
    backbone.enable_lora(2)
    model = random_biases(keras_hub.models.LlamaCausalLM(backbone))
    model.preprocessor = None
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    ids = np.random.default_rng(1).integers(0, 11, (7, 5)).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    plan = assert_engines_agree(model, (x, ids), groups=3)
    assert all("lora" in path for path, _ in plan.works)
