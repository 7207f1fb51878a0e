"""Convex sets and regularisers: vectors, firm nonexpansiveness, Keras."""

import re

import hypothesis
import interpolation_cases as cases
import keras
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from keras_stab import constraints as sets

NAMES = {
    "box": lambda p, r: sets.Box(-0.5, 0.5),
    "nonneg": lambda p, r: sets.NonNegative(),
    "l2_ball": lambda p, r: sets.L2Ball(r),
    "column_norm_ball": lambda p, r: sets.L2Ball(r, axis=0),
    "simplex": lambda p, r: sets.Simplex(r),
    "l1_ball": lambda p, r: sets.L1Ball(r),
    "spectral_norm_ball": lambda p, r: sets.SpectralBall(r),
    "l1 soft": lambda p, r: sets.L1(p["weight"]),
    "group l2": lambda p, r: sets.GroupL2(p["weight"], r),
    "l2^2": lambda p, r: sets.SquaredL2(p["weight"]),
    "elastic net": lambda p, r: sets.ElasticNet(p["l1"], p["l2"]),
    "nuclear": lambda p, r: sets.NuclearNorm(p["weight"]),
}
ROWS = [r for r in cases.VECTORS["prox"] if "not convex" not in r["name"]]


def operator(row):
    kind = max((k for k in NAMES if row["name"].startswith(k)), key=len)
    found = re.search(r"[rs]=(\d+)", row["name"])
    number = float(found.group(1)) if found else None
    if kind == "group l2":
        number = 0 if "axis 0" in row["name"] else None
    return NAMES[kind](row["params"], number)


def proximal(operator, value, step=0.3, dtype="float64"):
    value = keras.ops.convert_to_tensor(np.array(value), dtype)
    return keras.ops.convert_to_numpy(operator.proximal(value, step))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["name"] + str(r["shape"]))
@pytest.mark.parametrize(
    "dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)]
)
def test_vectors(row, dtype, tolerance):
    value = np.array(row["input"]).reshape(row["shape"])
    wanted = np.array(row["output"]).reshape(row["shape"])
    step = row["params"].get("gamma", 1.0)
    with cases.float64():
        found = proximal(operator(row), value, step, dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, wanted, atol=tolerance)


EACH = [
    sets.Box(-0.5, 1.0),
    sets.NonNegative(),
    sets.L2Ball(1.0),
    sets.L2Ball(1.0, axis=0),
    sets.Simplex(2.0),
    sets.Simplex(1.0, axis=None),
    sets.L1Ball(1.5),
    sets.L1Ball(1.5, axis=0),
    sets.SpectralBall(1.0),
    sets.L1(0.5),
    sets.GroupL2(1.5),
    sets.GroupL2(1.5, axis=0),
    sets.SquaredL2(2.0),
    sets.ElasticNet(0.5, 1.0),
    sets.NuclearNorm(1.0),
]
EVERY = pytest.mark.parametrize(
    "operator", EACH, ids=lambda o: f"{type(o).__name__}{o.get_config()}"
)
MATRICES = arrays.arrays(
    "float64",
    (2, 4, 3),
    elements=hypothesis.strategies.floats(-10.0, 10.0, width=16),
)


@EVERY
@hypothesis.settings(max_examples=20)
@hypothesis.given(MATRICES)
def test_firmly_nonexpansive(operator, pair):
    """|Pu - Pv|^2 <= <Pu - Pv, u - v>, and so at most |u - v|."""
    u, v = pair
    with cases.float64():
        change = proximal(operator, u) - proximal(operator, v)
    product = np.sum(change * (u - v))
    assert np.sum(change**2) <= product + 1e-9 * (1.0 + abs(product))


@EVERY
def test_sets_keep_what_is_inside(operator):
    value = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    found = proximal(operator, value, dtype="float32")
    if not isinstance(operator, sets.ConvexSet):
        return
    again = proximal(operator, found, dtype="float32")
    np.testing.assert_allclose(again, found, rtol=3e-7, atol=3e-7)
    # As a constraint of Keras.
    called = operator(keras.ops.convert_to_tensor(value))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(called), found)


@EVERY
def test_zero_stays_finite_and_the_config_goes_round(operator):
    found = proximal(operator, np.zeros((4, 3)), dtype="float32")
    assert np.all(np.isfinite(found))
    config = keras.saving.serialize_keras_object(operator)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(operator)
    assert again.get_config() == operator.get_config()


def test_a_layer_with_a_set_is_saved(tmp_path):
    ball = sets.SpectralBall(0.5)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(3, 2, kernel_constraint=ball),
        ]
    )
    model.compile("sgd", loss="mse")
    model.train_on_batch(np.ones((2, 6, 6, 2)), np.zeros((2, 5, 5, 3)))
    matrix = model.get_weights()[0].reshape(-1, 3)
    assert np.linalg.svd(matrix)[1].max() <= 0.5 * (1 + 1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    constraint = again.layers[0].kernel_constraint
    assert isinstance(constraint, sets.SpectralBall)
    assert constraint.radius == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: sets.Box(1.0, 0.0),
        lambda: sets.L2Ball(-1.0),
        lambda: sets.Simplex(0.0),
        lambda: sets.Simplex(1.0, axis=(0, 1)),
        lambda: sets.L1(-0.1),
        lambda: sets.SpectralBall(1.0)(keras.ops.ones((3,))),
        lambda: sets.SpectralBall(1.0)(keras.ops.ones((3, 2), "bfloat16")),
    ],
)
def test_what_is_refused(make):
    with pytest.raises(ValueError, match="Received"):
        make()
