"""Sharpness against Hessians that are known otherwise."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers

import keras_stab
from keras_stab.diagnostics.loss.dataset_loss import DatasetLoss
from keras_stab.numerics import spectrum
from keras_stab.numerics.vectors import Vectors

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(10, 3)).astype("float32")
Y = RANDOM.normal(size=(10, 2)).astype("float32")
WEIGHT = RANDOM.uniform(0.5, 2.0, size=10).astype("float32")
PENALTY = 0.03


def network():
    """A model with what a Hessian can go wrong at; 34 weights."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(
                4,
                activation="tanh",
                kernel_regularizer=keras.regularizers.L2(PENALTY),
                name="first",
            ),
            layers.BatchNormalization(name="norm", epsilon=0.1),
            layers.Dropout(0.5, seed=1, name="dropout"),
            layers.Dense(2, name="second"),
        ]
    )
    random = np.random.default_rng(5)
    model.set_weights(
        [
            random.uniform(0.5, 1.5, v.shape)
            if "norm" in v.path
            else random.normal(size=v.shape)
            for v in model.weights
            if "seed" not in v.path
        ]
        + [w for w in model.get_weights() if w.dtype != np.float32]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def loss_by_hand(model, flat, batches, training=False):
    """The loss of that network once more, in NumPy float64."""
    weights = [np.asarray(w, "float64") for w in model.get_weights()[:8]]
    kernel, bias, gamma, beta, mean, variance, other, last = weights
    own = [kernel, bias, gamma, beta, other, last]
    pieces = np.split(flat, np.cumsum([w.size for w in own])[:-1])
    kernel, bias, gamma, beta, other, last = (
        p.reshape(w.shape) for p, w in zip(pieces, own)
    )
    total, rows = 0.0, 0
    for x, y, weight in batches:
        hidden = np.tanh(x @ kernel + bias)
        if training:
            mean, variance = hidden.mean(axis=0), hidden.var(axis=0)
        hidden = (hidden - mean) / np.sqrt(variance + 0.1) * gamma + beta
        errors = np.square(hidden @ other + last - y).mean(axis=1)
        penalty = PENALTY * np.square(kernel).sum()
        total += len(x) * ((weight * errors).mean() + penalty)
        rows += len(x)
    return total / rows


def hessian_by_hand(function, at, step=1e-4):
    """By central differences."""
    unit = step * np.eye(len(at))
    hessian = np.zeros((len(at), len(at)))
    for i in range(len(at)):
        for j in range(i + 1):
            both, apart = unit[i] + unit[j], unit[i] - unit[j]
            hessian[i, j] = hessian[j, i] = (
                function(at + both)
                - function(at + apart)
                - function(at - apart)
                + function(at - both)
            ) / (2 * step) ** 2
    return hessian


def cut(size):
    return [
        (X[i : i + size], Y[i : i + size], WEIGHT[i : i + size])
        for i in range(0, len(X), size)
    ]


def in_pieces(whole, flat):
    """A flat array as a vector of the loss."""
    pieces = np.split(flat, np.cumsum(whole.sizes)[:-1])
    return whole.packed(
        [p.reshape(v.shape) for p, v in zip(pieces, whole.variables)]
    )


def flat(vector):
    arrays = [keras.ops.convert_to_numpy(part) for part in vector]
    return np.concatenate([a.ravel() for a in arrays])


def product_with(whole, vector):
    return flat(whole.hessian_product(in_pieces(whole, vector)))


def state(model):
    model_state = [*model.variables, *model.metrics_variables]
    return [
        np.array(keras.ops.convert_to_numpy(v))
        for v in [*model_state, *model.optimizer.variables]
    ]


def assert_same(before, after):
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.fixture(scope="module")
def model():
    return network()


def test_agrees_with_the_whole_hessian(model):
    """Weighted rows, a penalty, moving statistics, a short last batch."""
    before = state(model)
    found = keras_stab.sharpness(
        model, (X, Y, WEIGHT), batch_size=4, layers="all", verbose=0
    )
    assert_same(before, state(model))
    own = [v.numpy() for v in model.trainable_variables]
    at = np.concatenate([w.ravel() for w in own]).astype("float64")

    def function(flat):
        return loss_by_hand(model, flat, cut(4))

    hessian = hessian_by_hand(function, at)
    largest = np.linalg.eigvalsh(hessian)[-1]
    assert found.loss == pytest.approx(function(at), rel=1e-5)
    assert found.largest_eigenvalue == pytest.approx(largest, rel=1e-4)
    assert found.eigenvalue_error <= 1e-4 * largest
    assert found.parameters == len(at)
    # 10 of 30 directions are known exactly, the rest are sampled.
    assert abs(found.trace - np.trace(hessian)) < 4 * found.trace_error
    assert found.trace_error < 0.15 * np.trace(hessian)
    parts = {
        "first": slice(0, 16),
        "norm": slice(16, 24),
        "second": slice(24, 34),
    }
    assert list(found.layers) == list(parts)
    for name, part in parts.items():
        block = hessian[part, part]
        layer = found.layers[name]
        assert layer.largest_eigenvalue == pytest.approx(
            np.linalg.eigvalsh(block)[-1], rel=1e-4
        )
        assert layer.parameters == len(block)
    layers_together = sum(layer.trace for layer in found.layers.values())
    assert layers_together == pytest.approx(found.trace)
    # Enough products: exact.
    exact = keras_stab.sharpness(
        model,
        cut(4),
        measures="trace",
        layers=["first", model.get_layer("second")],
        trace_products=3 * len(at),
        verbose=0,
    )
    assert exact.trace == pytest.approx(np.trace(hessian), rel=1e-4)
    for name in ("first", "second"):
        block = hessian[parts[name], parts[name]]
        wanted = pytest.approx(np.trace(block), rel=1e-4)
        assert exact.layers[name].trace == wanted
    assert exact.largest_eigenvalue is None and exact.sam is None


def test_sharpness_in_the_ball(model):
    """The first step is exact; the way up finds at least as much."""
    rho = 0.2
    found = keras_stab.sharpness(
        model,
        (X, Y, WEIGHT),
        measures=["sam"],
        rho=rho,
        ascent_steps=8,
        batch_size=4,
        verbose=0,
    )
    own = [v.numpy() for v in model.trainable_variables]
    at = np.concatenate([w.ravel() for w in own]).astype("float64")

    def function(flat):
        return loss_by_hand(model, flat, cut(4))

    def gradient(flat):
        unit = 1e-5 * np.eye(len(flat))
        return np.array(
            [(function(flat + u) - function(flat - u)) / 2e-5 for u in unit]
        )

    uphill = gradient(at)
    assert found.gradient_norm == pytest.approx(
        np.linalg.norm(uphill), rel=1e-4
    )
    first = function(at + rho * uphill / np.linalg.norm(uphill)) - function(at)
    assert found.sam_first_order == pytest.approx(first, rel=1e-4)
    # Plain projected ascent with short steps, many of them.
    shift, best = np.zeros(len(at)), 0.0
    for _ in range(60):
        shift = shift + 0.3 * rho * gradient(at + shift)
        shift *= min(1.0, rho / np.linalg.norm(shift))
        best = max(best, function(at + shift) - function(at))
    assert found.sam == pytest.approx(best, rel=1e-3)
    assert found.sam >= found.sam_first_order


def test_training_mode(model):
    """Statistics of each batch, dropout off: it has no part in this."""
    model.get_layer("dropout").rate = 0.0
    before = state(model)
    whole = DatasetLoss(model, cut(5), None, True, None, 32)
    vector = np.random.default_rng(0).normal(size=34)
    product = product_with(whole, vector)
    assert_same(before, state(model))
    own = [v.numpy() for v in model.trainable_variables]
    at = np.concatenate([w.ravel() for w in own]).astype("float64")
    hessian = hessian_by_hand(
        lambda flat: loss_by_hand(model, flat, cut(5), training=True), at
    )
    np.testing.assert_allclose(product, hessian @ vector, atol=2e-4)


def test_dropout_masks_are_those_of_one_function():
    """Otherwise the matrix would be another at every product."""
    model = keras.Sequential([layers.Dropout(0.5), layers.Dense(1)])
    model.compile("sgd", "mse")
    data = (X, Y[:, :1])
    model.train_on_batch(*data)
    before = state(model)
    whole = DatasetLoss(model, data, None, True, None, 32)
    one, other = np.eye(4)[[0, 2]]
    products = [product_with(whole, v) for v in (one, other, one)]
    np.testing.assert_array_equal(products[0], products[2])
    assert products[0] @ other == pytest.approx(products[1] @ one, abs=1e-6)
    assert_same(before, state(model))


# ---- Other models, losses and data ----------------------------------------


def quadratic(scale=1.0):
    """One weight a row: the Hessian of its loss is diagonal."""
    model = keras.Sequential(
        [layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )
    curvatures = np.array([8.0, 1.0, 3.0, 0.5, 2.0])
    # The mean over 5 rows of (x w)^2.
    x = scale * np.diag(np.sqrt(2.5 * curvatures)).astype("float32")
    return model, x, np.zeros((5, 1), "float32"), curvatures


def from_generator(x, y):
    for i in range(0, len(x), 2):
        yield x[i : i + 2], y[i : i + 2]


class Rows(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.x[2 * i : 2 * i + 2], self.y[2 * i : 2 * i + 2]


def test_a_quadratic_loss_in_all_forms_of_data_and_loss():
    model, x, y, curvatures = quadratic()
    losses = ("mse", keras.losses.MeanSquaredError())
    losses += (keras.losses.mean_squared_error,)
    for data in ((x, y), from_generator(x, y), Rows(x, y)):
        for loss in losses:
            if not isinstance(data, tuple) and loss != "mse":
                continue
            found = keras_stab.sharpness(
                model, data, loss=loss, batch_size=2, rho=0.1, verbose=0
            )
            # Random signs give the trace of a diagonal matrix without error.
            assert found.trace == pytest.approx(curvatures.sum(), rel=1e-5)
            assert found.trace_error < 1e-4
            assert found.largest_eigenvalue == pytest.approx(8.0, rel=1e-5)
            # At the minimum there is no way along the gradient.
            assert found.sam_first_order == 0.0
            assert 0.6 < found.sam / (0.5 * 8.0 * 0.1**2) < 1.0 + 1e-4
    assert "largest eigenvalue" in str(found)
    assert found.as_dict()["trace"] == found.trace
    assert found.passes > 0
    half = keras_stab.sharpness(
        model, (x, y), loss="mse", batch_size=2, steps=1, verbose=0
    )
    # Two rows of five: each counts 5 / 2 as much.
    assert half.largest_eigenvalue == pytest.approx(20.0, rel=1e-5)


def test_progress_and_no_convergence(capsys):
    model, x, y, _ = quadratic()
    with pytest.warns(UserWarning, match="raise `eigenvalue_products`"):
        found = keras_stab.sharpness(
            model,
            (x, y),
            loss="mse",
            measures="eigenvalue",
            eigenvalue_products=2,
        )
    assert abs(found.largest_eigenvalue - 8.0) <= found.eigenvalue_error
    assert "pass" in capsys.readouterr().out


class Attentive(keras.Model):
    """An embedding, attention, normalisation, two outputs."""

    def __init__(self, recurrent=False):
        super().__init__()
        # Of size 1: normalising small numbers curves the loss too much for
        # differences of gradients.
        self.table = layers.Embedding(
            7, 4, embeddings_initializer=keras.initializers.RandomNormal(0, 1)
        )
        self.attention = layers.MultiHeadAttention(2, 2)
        self.norm = layers.LayerNormalization()
        self.pool = layers.GlobalAveragePooling1D()
        if recurrent:
            self.pool = layers.GRU(3)
        self.first = layers.Dense(2)
        self.second = layers.Dense(1)

    def call(self, ids):
        hidden = self.table(ids)
        hidden = self.norm(hidden + self.attention(hidden, hidden))
        hidden = self.pool(hidden)
        return self.first(hidden), self.second(hidden)


@pytest.mark.parametrize(
    "recurrent", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_layers_of_many_kinds(recurrent):
    """Products agree with differences of gradients; nothing is built twice."""
    model = Attentive(recurrent)
    model.compile("sgd", ["mse", "huber"])
    ids = np.random.default_rng(0).integers(0, 7, (4, 5))
    data = (ids, (Y[:4], Y[:4, :1]))
    whole = DatasetLoss(model, [data], None, False, None, 32)
    assert not model.optimizer.built
    vector = np.random.default_rng(1).normal(size=sum(whole.sizes))
    product = product_with(whole, vector)
    step = 1e-3
    above, below = (
        flat(whole.with_gradient(in_pieces(whole, shift))[1])
        for shift in (step * vector, -step * vector)
    )
    wanted = (above - below) / (2 * step)
    assert np.linalg.norm(product - wanted) < 0.01 * np.linalg.norm(wanted)
    again = DatasetLoss(model, [data], None, False, None, 32)
    assert again._functions is whole._functions
    model.compile("sgd", ["mse", "huber"])
    again = DatasetLoss(model, [data], None, False, None, 32)
    assert again._functions is not whole._functions


class Cube(layers.Layer):
    """With a gradient of its own."""

    def call(self, inputs):
        @keras.ops.custom_gradient
        def cube(x):
            def gradient(*args, upstream=None):
                (upstream,) = args if upstream is None else (upstream,)
                return 3.0 * x**2 * upstream

            return x**3, gradient

        return cube(inputs)


def test_half_precision_warns_and_gradients_of_ones_own_work():
    model = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(1, use_bias=False, kernel_initializer="ones"),
            Cube(),
        ]
    )
    data = (np.ones((2, 1), "float32"), np.zeros((2, 1), "float32"))
    # L = w^6
    found = keras_stab.sharpness(
        model, data, "mse", measures="eigenvalue", verbose=0
    )
    assert found.largest_eigenvalue == pytest.approx(30.0, rel=1e-4)
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    with pytest.warns(UserWarning, match="half precision"):
        keras_stab.sharpness(model, data, "mse", measures="sam", verbose=0)


def test_a_model_is_not_kept_alive():
    model, x, y, _ = quadratic()
    found = weakref.ref(model)
    keras_stab.sharpness(model, (x, y), "mse", measures="sam", verbose=0)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert found() is None


def test_inside_fit(model):
    """At the end of an epoch, without a trace in the training."""

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            found = keras_stab.sharpness(
                self.model, (X, Y), measures="sam", batch_size=5, verbose=0
            )
            seen.append(found.sam)

    seen, ends = [], []
    for callbacks in ([], [Look()]):
        trained = network()
        history = trained.fit(
            X,
            Y,
            batch_size=5,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        ends.append([*state(trained), np.array(history.history["loss"])])
    assert_same(*ends)
    assert len(set(seen)) == 2


# ---- Bad input ------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": []}, "no batches"),
        ({"data": (X[:0], Y[:0])}, "no batches"),
        ({"data": 3}, "iterable of batches"),
        ({"rho": 0.0}, "`rho` must be above 0"),
        ({"rho": -1.0}, "`rho` must be above 0"),
        ({"layers": ["third"]}, "no such layer.*'third'.*first, norm"),
        ({"layers": "dropout"}, "no trainable weights"),
        ({"measures": ["hessian"]}, "`measures` must be a list or tuple"),
        ({"trace_products": 2}, "`trace_products` must be an integer"),
        ({"steps": 0}, "`steps` must be an integer"),
        ({"loss": 3}, "`loss` must be"),
        ({"data": X, "loss": Y}, r"as one tuple, \(x, y\)"),
        ({"layers": 3}, "`layers` must be"),
        ({"data": X}, r"pass data=\(x, y\)"),
        ({"data": X, "loss": "mse"}, r"pass data=\(x, y\)"),
        ({"data": (X * np.nan, Y)}, "The loss is not finite"),
        ({"training": 1}, "`training` must be a boolean"),
    ],
)
def test_bad_input_changes_nothing(model, arguments, message):
    before = state(model)
    arguments = {"data": (X, Y), "verbose": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        keras_stab.sharpness(model, **arguments)
    assert_same(before, state(model))


def test_models_without_a_loss_or_weights():
    model, x, y, _ = quadratic()
    with pytest.raises(ValueError, match="pass `loss`"):
        keras_stab.sharpness(model, (x, y), verbose=0)
    model.compile("sgd")
    with pytest.raises(ValueError, match="pass `loss`"):
        keras_stab.sharpness(model, (x, y), verbose=0)
    model(x)
    model.trainable = False
    with pytest.raises(ValueError, match="no trainable weights"):
        keras_stab.sharpness(model, (x, y), "mse", verbose=0)
    with pytest.raises(ValueError, match="must be a keras.Model"):
        keras_stab.sharpness(layers.Dense(1), (x, y), "mse", verbose=0)


# ---- The mathematics alone ------------------------------------------------


def test_the_spectrum_of_matrices_of_all_kinds():
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(60, 60)))
    spectra = {
        "outliers": np.r_[[50.0, 20.0, 5.0], random.uniform(-0.1, 0.1, 57)],
        "flat": random.uniform(0.5, 1.0, 60),
        "negative": np.r_[[-9.0, -3.0], random.uniform(-1.0, -0.5, 58)],
        "one": np.r_[[2.0], np.zeros(59)],
        "zero": np.zeros(60),
    }
    vectors = Vectors()

    def as_vector(array):
        halves = array.astype("float32").reshape(2, 30)
        return [keras.ops.convert_to_tensor(half) for half in halves]

    for name, values in spectra.items():
        matrix = ((rotation * values) @ rotation.T).astype("float32")
        tensor = keras.ops.convert_to_tensor(matrix)
        start = as_vector(random.normal(size=60))

        def product(vector):
            whole = keras.ops.concatenate(vector)
            return keras.ops.split(keras.ops.matmul(tensor, whole), [30])

        found = spectrum.largest_eigenvalue(product, vectors, start, 60, 1e-4)
        largest = np.linalg.eigvalsh(matrix.astype("float64"))[-1]
        scale = np.abs(values).max()
        assert found.value == pytest.approx(largest, rel=1e-4, abs=1e-5 * scale)

        def signs(i):
            random = np.random.default_rng(i)
            return as_vector(random.choice([-1.0, 1.0], size=60))

        def parts(left, right):
            both = vectors.times(left, right)
            return np.array([float(keras.ops.sum(half)) for half in both])

        found = spectrum.trace(product, vectors, parts, signs, 30)
        halves = np.diagonal(matrix).reshape(2, 30).sum(axis=1)
        spread = np.std(found.samples) / len(found.samples) ** 0.5
        slack = 5 * spread + 1e-4 * scale
        assert abs(found.parts.sum() - halves.sum()) <= slack, name
        if name in ("one", "zero"):
            np.testing.assert_allclose(found.parts, halves, atol=1e-4)
