"""Diagnostics of float64 models compute in float64.

The model and its loss use sums alone: on some backends Keras computes `matmul`
and `mean` of float64 tensors in float32.
"""

import keras
import numpy as np
import pytest
from keras import layers

import keras_stab

RANDOM = np.random.default_rng(8)
X = RANDOM.normal(size=(24, 3))
Y = RANDOM.normal(size=(24, 1))
START = np.array([0.3, -1.2, 0.7])


@pytest.fixture(autouse=True)
def float64():
    settings = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    jax = None
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    yield
    if jax is not None:
        jax.config.update("jax_enable_x64", False)
    keras.config.set_floatx(settings[0])
    keras.config.set_dtype_policy(settings[1])


class Linear(keras.Model):
    def build(self, shape):
        self.w = self.add_weight(shape=(3,), initializer="zeros")

    def call(self, x):
        return keras.ops.sum(x * self.w, axis=-1, keepdims=True)

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return keras.ops.sum(keras.ops.square(y_pred - y)) * (1 / y.shape[0])


def linear():
    model = Linear()
    model(X)
    model.set_weights([START])
    # A rate that keeps the gradients as they are: the same at every step.
    model.compile(keras.optimizers.SGD(0.0))
    return model


def loss(w):
    return np.mean((X @ w - Y[:, 0]) ** 2)


GRADIENT = 2 * X.T @ (X @ START - Y[:, 0]) / len(X)
HESSIAN = 2 * X.T @ X / len(X)


def test_sharpness():
    found = keras_stab.sharpness(
        linear(), (X, Y), batch_size=9, rho=0.1, tolerance=1e-14, verbose=0
    )
    assert found.loss == pytest.approx(loss(START), rel=1e-13)
    norm = np.linalg.norm(GRADIENT)
    assert found.gradient_norm == pytest.approx(norm, rel=1e-13)
    largest = np.linalg.eigvalsh(HESSIAN)[-1]
    assert found.largest_eigenvalue == pytest.approx(largest, rel=1e-12)
    assert found.trace == pytest.approx(np.trace(HESSIAN), rel=1e-12)
    rise = loss(START + 0.1 * GRADIENT / norm) - loss(START)
    assert found.sam_first_order == pytest.approx(rise, rel=1e-12)


def test_landscape():
    other = START + 1.0
    found = keras_stab.loss_landscape(
        linear(), (X, Y), to=[other], points=5, verbose=0
    )
    wanted = [loss(START + a) for a in found.coordinates[0]]
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-13)
    plane = keras_stab.loss_landscape(
        linear(), (X, Y), directions=[[START], [other]], points=3, verbose=0
    )
    wanted = [
        [loss(START + a * START + b * other) for b in plane.coordinates[1]]
        for a in plane.coordinates[0]
    ]
    np.testing.assert_allclose(plane.losses, wanted, rtol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm(masked):
    model = keras.Sequential(
        [
            keras.Input((1, 3)),
            *[layers.Masking()] * masked,
            layers.BatchNormalization(),
        ]
    )
    x = 1e4 + X
    keras_stab.reestimate_batch_norm(model, x[:, None], batch_size=7, verbose=0)
    mean, variance = model.get_weights()[2:]
    assert mean.dtype == variance.dtype == "float64"
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(variance, X.var(axis=0), rtol=1e-9)


def test_the_probe_of_the_monitor():
    monitor = keras_stab.StabilityMonitor(
        every=1, probe=(X, Y), groups=3, batch_size=24
    )
    model = linear()
    model.fit(X, Y, batch_size=24, verbose=0, callbacks=[monitor])
    np.testing.assert_array_equal(model.get_weights()[0], START)
    sizes = X.shape[0] // 3
    groups = [
        2 * X[k::3].T @ (X[k::3] @ START - Y[k::3, 0]) / sizes for k in range(3)
    ]
    gram = np.array([[a @ b for b in groups] for a in groups])
    mean_square, square = np.trace(gram) / 3, np.sum(gram) / 9
    noise = len(X) * (mean_square - square) / 2
    size = (3 * square - mean_square) / 2
    for sample in monitor.samples:
        assert sample["probe/gradient_noise"] == pytest.approx(noise, 1e-6)
        assert sample["probe/gradient_norm_squared"] == pytest.approx(
            size, 1e-6
        )
        assert sample["probe/conflict_rate"] == np.mean(gram.sum(axis=1) < 0)
