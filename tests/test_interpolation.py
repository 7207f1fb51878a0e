"""RAPP, Lookahead and the extragradient family: vectors and theorems."""

import warnings

import interpolation_cases as cases
import keras
import numpy as np
import pytest
from interpolation_cases import BACKEND
from interpolation_cases import VECTORS

# On TensorFlow rates and decays pass through float32.
EXACT = 1e-6 if BACKEND == "tensorflow" else 1e-12
SEQUENCES = [r for r in VECTORS["apply_sequences"] if cases.applied(r)]


@pytest.fixture(autouse=True)
def no_warning_of_the_unrelaxed_method():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "relaxation=1")
        yield


def close(actual, wanted, tolerance):
    """|a - b| <= tolerance max(1, |b|)."""
    actual, wanted = np.array(actual), np.array(wanted)
    bound = tolerance * np.maximum(1.0, np.abs(wanted))
    np.testing.assert_array_less(np.abs(actual - wanted), bound + 1e-300)


def identify(row):
    return row.get("id") or f"{row['name']}|{row['problem']}|{row['params']}"


def feed(row, **arguments):
    """Runs the train step of Keras on the gradients of a row."""
    model = cases.Fed(row["z0"], cases.DOMAINS.get(row["problem"]))
    model.compile(optimizer=cases.applied(row), **arguments)
    for step in row["steps"]:
        model.train_on_batch(np.array([step["F"]]))
        yield model.point(), step["z"]


# ---- Vectors --------------------------------------------------------------


@pytest.mark.parametrize("row", SEQUENCES, ids=identify)
def test_apply_sequences(row):
    with cases.float64():
        domain = cases.DOMAINS.get(row["problem"])
        pair = [
            keras.Variable(z, dtype="float64", name=name)
            for z, name in zip(row["z0"], "xy")
        ]
        for variable in pair:
            variable.constraint = domain
        optimizer = cases.applied(row)
        for step in row["steps"]:
            field = [
                keras.ops.convert_to_tensor(f, "float64") for f in step["F"]
            ]
            optimizer.apply(field, pair)
            close([float(v.numpy()) for v in pair], step["z"], EXACT)


# One of a kind, and those in which a projection is active.
STEPPED = [
    row
    for row in SEQUENCES
    if row["problem"] in ("bilinear_shift_box", "quadratic_box")
    or row["name"].startswith(("LA-Adam", "LA-SGDm", "ExtraAdam sep", "nested"))
]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=identify(row),
            marks=[] if row in STEPPED[::3] else pytest.mark.slow,
        )
        for row in SEQUENCES
    ],
)
def test_apply_sequences_in_a_compiled_step(row):
    for jit in [False, True] if BACKEND == "tensorflow" else ["auto"]:
        for actual, wanted in feed(row, jit_compile=jit):
            close(actual, wanted, 1e-4)


def test_late_slow_weights_are_another_method():
    wrong = next(r for r in VECTORS["apply_sequences"] if "WRONG" in r["name"])
    row = next(r for r in SEQUENCES if r["name"] == "LA-SGD")
    assert row["params"] == wrong["params"]
    after = [r["steps"][2]["z"] for r in (row, wrong)]
    assert np.abs(np.subtract(*after)).max() > 0.1


@pytest.mark.parametrize("row", VECTORS["inner_sequences"], ids=str)
def test_inner_sequences(row):
    params = {k: row[k] for k in ("gamma", "lambda", "tau")}
    with cases.float64():
        walk = cases.walk(row["problem"], "RAPP", params, row["z0"])
        for outer in row["outer"]:
            for point in outer["w_0_to_tau"][:-1]:
                close(walk.point(), point, EXACT)
                walk.step(1)
            close(walk.point(), outer["z_next"], EXACT)


TRAJECTORIES = VECTORS["trajectories"]
# The first of every method on every problem with a domain.
FIRST = {}
for t in TRAJECTORIES:
    if t["problem"] in cases.DOMAINS:
        FIRST.setdefault(t["method"], t)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=row["id"],
            marks=[] if row in FIRST.values() else pytest.mark.slow,
        )
        for row in TRAJECTORIES
    ],
)
def test_trajectories(row):
    params = row["params"]
    applies = cases.applies_per_step(row["method"], params)
    with cases.float64():
        walk = cases.walk(row["problem"], row["method"], params, row["z0"])
        for wanted in row["z_1_to_10"]:
            if None in wanted:
                break
            walk.step(applies)
            # What diverges multiplies the rounding of float32 rates too.
            slack = 100 if BACKEND == "tensorflow" else 1
            close(walk.point(), wanted, slack * EXACT)


@pytest.mark.parametrize(
    "kind", sorted({r["method"] for r in VECTORS["spectral"]})
)
def test_radius_of_linear_games(kind):
    """A cycle multiplies the distance by the closed form."""
    rows = [r for r in VECTORS["spectral"] if r["method"] == kind]
    if BACKEND != "torch":  # a program for each of them
        rows = rows[:: max(1, len(rows) // 3)]
    start = np.array([1.0, 0.5])
    with cases.float64():
        for row in rows:
            real, imaginary = -row["minus_rho_L"], None
            imaginary = np.sqrt(1.0 - real**2).item()

            def field(x, y):
                return real * x + imaginary * y, real * y - imaginary * x

            params = {"gamma": row["gammaL"], **row}
            name = kind.replace("LA-EG+", "LA-CEG+")
            name = "CEG+" if name == "EG+" else name
            walk = cases.Walk(cases.method(name, params), field, start)
            walk.step(cases.applies_per_step(name, params))
            radius = np.linalg.norm(walk.point()) / np.linalg.norm(start)
            close(radius, row["radius"], EXACT)
