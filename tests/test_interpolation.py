"""RAPP, Lookahead and the extragradient family: vectors and theorems."""

import warnings

import interpolation_cases as cases
import keras
import numpy as np
import pytest
from interpolation_cases import BACKEND
from interpolation_cases import SGD
from interpolation_cases import VECTORS

import keras_stab
from keras_stab.constraints import Box

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


def some(rows, unmarked):
    """Rows for `parametrize`; those not among `unmarked` are slow."""
    return [
        pytest.param(
            row,
            id=identify(row),
            marks=[] if row in unmarked else pytest.mark.slow,
        )
        for row in rows
    ]


@pytest.mark.parametrize(
    "row", some(SEQUENCES, SEQUENCES[:: 1 if BACKEND == "torch" else 3])
)
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


# In both the optimizer is built inside the traced step, and a projection is
# active at a synchronisation.
COMPILED = [
    row
    for row in SEQUENCES
    if (row["name"], row["problem"])
    in (
        ("RAPP", "bilinear_shift_box"),
        ("LA-CEG+ (period in base steps)", "bilinear_shift_box"),
    )
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("row", some(SEQUENCES, COMPILED))
def test_apply_sequences_in_a_compiled_step(row, jit):
    if jit != (BACKEND == "jax") and BACKEND != "tensorflow":
        return
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


@pytest.mark.parametrize("row", some(TRAJECTORIES, list(FIRST.values())))
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


def linear(real, imaginary):
    """The field of a game with the eigenvalues real +- i imaginary."""

    def field(x, y):
        return real * x + imaginary * y, real * y - imaginary * x

    return field


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
            real = -row["minus_rho_L"]
            field = linear(real, (1.0 - real**2) ** 0.5)
            params = {"gamma": row["gammaL"], **row}
            name = kind.replace("LA-EG+", "LA-CEG+")
            name = "CEG+" if name == "EG+" else name
            walk = cases.Walk(cases.method(name, params), field, start)
            walk.step(cases.applies_per_step(name, params))
            radius = np.linalg.norm(walk.point()) / np.linalg.norm(start)
            close(radius, row["radius"], EXACT)


# ---- Theorems -------------------------------------------------------------

FOUND = [
    r
    for r in TRAJECTORIES
    if r["status"] == "conv" and r["method"] in ("RAPP", "CEG+", "LA-CEG+")
]
SOON = [
    r
    for r in FOUND
    if (r["method"], r["problem"]) in (("RAPP", "bilinear"),)
    and r["params"]["tau"] == 2
]


@pytest.mark.parametrize("row", some(FOUND, SOON))
def test_first_index_near_the_solution(row):
    params, wanted = row["params"], row["first_outer_index"]
    applies = cases.applies_per_step(row["method"], params)
    solution = VECTORS["problems"][row["problem"]]["solution"]
    with cases.float64():
        walk = cases.walk(row["problem"], row["method"], params, row["z0"])
        walk.step(applies * (wanted - 2))
        assert np.linalg.norm(walk.point() - solution) >= 1e-6
        walk.step(applies * 3)
        assert np.linalg.norm(walk.point() - solution) < 1e-6


@pytest.mark.slow
def test_gradient_steps_end_in_the_cycle_of_the_polar_game():
    name, rate = "polar_a1/3", 1.0 / VECTORS["problems"]["polar_a1/3"]["L"]
    with cases.float64():
        walk = cases.walk(name, "GDA", {"gamma": rate}, [1.0, 0.5])
        walk.step(3000)
        for _ in range(50):
            walk.step(1)
            assert 1.10 <= np.linalg.norm(walk.point()) <= 1.14


def test_the_inner_error_shrinks_by_the_rate():
    """In the game x y by gamma L exactly."""
    start, rate = np.array([1.0, 0.5]), 0.5
    step = np.array([[1.0, rate], [-rate, 1.0]])
    resolvent = np.linalg.solve(step, start)
    with cases.float64():
        params = {"gamma": rate, "lambda": 0.5, "tau": 9}
        walk = cases.walk("bilinear", "RAPP", params, start)
        error = np.linalg.norm(start - resolvent)
        for _ in range(8):
            walk.step(1)
            error, before = np.linalg.norm(walk.point() - resolvent), error
            assert error / before == pytest.approx(rate, rel=1e-9)


def test_residual_of_random_comonotone_games():
    """The residual never grows and stays under its bound, in 300 games."""
    generator = np.random.default_rng(3)
    c, rate, relaxation = 0.45, 0.9, 0.5
    size = generator.uniform(0.05, 1.0, 300)
    real = generator.uniform(-c * size**2, size)
    eigenvalues = real + 1j * np.sqrt(size**2 - real**2)
    with cases.float64():
        field = linear(
            *[
                keras.ops.convert_to_tensor(part)
                for part in (eigenvalues.real, eigenvalues.imag)
            ]
        )
        optimizer = keras_stab.RAPP(rate, 200, relaxation)
        start = generator.normal(size=(2, 300))
        walk = cases.Walk(optimizer, field, start)
        last = np.full(300, np.inf)
        for k in range(4):
            z = walk.point()
            # As complex numbers the field is a product with the conjugate.
            z = z[0] + 1j * z[1]
            ahead = z / (1 + rate * eigenvalues.conj())
            residual = np.abs(ahead - z)
            assert np.all(residual <= last * (1 + 1e-9))
            distance = np.abs(eigenvalues * ahead)
            bound = np.sum(start**2, axis=0) / (
                rate**2 * relaxation * (1 - relaxation) * (k + 1)
            )
            assert np.all(distance**2 <= bound)
            last = residual
            walk.step(200)


def test_relaxation_stabilises_where_the_resolvent_expands():
    """Below 2 (1 + rho / gamma) = .857 on the quadratic game, c = .4."""
    field = linear(-0.4, (1 - 0.4**2) ** 0.5)
    for relaxation, stable in ((0.85, True), (0.865, False)):
        with cases.float64():
            walk = cases.Walk(
                keras_stab.RAPP(0.7, 60, relaxation), field, [1.0, 0.5]
            )
            walk.step(60)
            grown = np.linalg.norm(walk.point()) / np.linalg.norm([1.0, 0.5])
            assert (grown < 1.0) == stable


def test_special_cases():
    field, start = cases.FIELDS["forsaken_free"], [0.3, -0.2]

    def end(optimizer, steps, domain=None):
        walk = cases.Walk(optimizer, field, start, domain)
        walk.step(steps)
        return walk.point()

    with cases.float64():
        extra = end(keras_stab.ExtraGradient(SGD(0.1), 0.25), 6)
        close(end(keras_stab.RAPP(0.1, 2, 0.25), 6), extra, EXACT)
        close(end(keras_stab.CEGPlus(0.1, 0.25), 6), extra, EXACT)
        plain = end(SGD(0.1), 6)
        close(end(keras_stab.RAPP(0.4, 1, 0.25), 6), plain, EXACT)
        full = end(keras_stab.Lookahead(SGD(0.1), 2, 1.0), 6)
        np.testing.assert_array_equal(full, plain)
        past = end(keras_stab.PastExtraGradient(SGD(0.1)), 6)
        optimistic = keras_stab.OptimisticGradient(SGD(0.1), "zero")
        close(past, end(optimistic, 6), EXACT)
        # A start outside of the set is projected, once.
        outside = keras_stab.RAPP(0.1, 2, 0.5)
        assert np.abs(end(outside, 2, Box(-0.1, 0.1))).max() <= 0.1
