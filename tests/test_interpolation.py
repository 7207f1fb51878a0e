"""RAPP, Lookahead and the extragradient family: vectors and theorems."""

import warnings

import interpolation_cases as cases
import keras
import numpy as np
import pytest
from interpolation_cases import BACKEND
from interpolation_cases import SGD
from interpolation_cases import VECTORS
from marks import quick

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
    with cases.float64():
        for actual, wanted in feed(row, jit_compile=jit):
            close(actual, wanted, EXACT)


def test_late_slow_weights_are_another_method():
    wrong = next(r for r in VECTORS["apply_sequences"] if "WRONG" in r["name"])
    row = next(r for r in SEQUENCES if r["name"] == "LA-SGD")
    assert row["params"] == wrong["params"]
    after = [r["steps"][2]["z"] for r in (row, wrong)]
    assert np.abs(np.subtract(*after)).max() > 0.1


@pytest.mark.parametrize(
    "problem, rate, off",
    [("bilinear_shift_box", 0.7, 0.09), ("quadratic_box", 0.25, 0.18)],
)
def test_late_projection_is_another_method(problem, rate, off):
    """As Keras does it: interpolated first, clipped after the optimizer."""
    (row,) = [
        r
        for r in SEQUENCES
        if (r["name"], r["problem"], r["params"].get("gamma"))
        == ("RAPP", problem, rate)
    ]
    pair = [keras.Variable(z, dtype="float32") for z in row["z0"]]
    optimizer = cases.applied(row)
    distances = []
    for step in row["steps"]:
        optimizer.apply(
            [keras.ops.convert_to_tensor(f) for f in step["F"]], pair
        )
        for variable in pair:
            variable.assign(cases.DOMAINS[problem](variable.value))
        point = [float(v.numpy()) for v in pair]
        distances.append(np.abs(np.subtract(point, step["z"])).max())
    assert max(distances) > off


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


def radii(name, params, c):
    """What a cycle multiplies distances by, in games with L = 1."""
    c = np.array(c)
    field = linear(*map(constant, (-c, (1.0 - c**2) ** 0.5)))
    start = np.stack([np.ones_like(c), np.full_like(c, 0.5)])
    walk = cases.Walk(cases.method(name, params), field, start)
    walk.step(cases.applies_per_step(name, params))
    return np.linalg.norm(walk.point(), axis=0) / np.linalg.norm(start, axis=0)


def constant(values):
    return keras.ops.convert_to_tensor(values, "float64")


# Rows of one method are one walk: the games differ, the program does not.
SPECTRAL = {}
for r in VECTORS["spectral"]:
    kind = {k: r[k] for k in r if k not in ("minus_rho_L", "radius")}
    SPECTRAL.setdefault(str(kind), []).append(r)


@pytest.mark.parametrize("kind", SPECTRAL)
def test_radius_of_linear_games(kind):
    """A cycle multiplies the distance by the closed form."""
    rows = SPECTRAL[kind]
    name = rows[0]["method"].replace("EG+", "CEG+")
    with cases.float64():
        found = radii(
            name,
            {"gamma": rows[0]["gammaL"], **rows[0]},
            [row["minus_rho_L"] for row in rows],
        )
    close(found, [row["radius"] for row in rows], EXACT)


# ---- Theorems -------------------------------------------------------------

FOUND = [r for r in TRAJECTORIES if r["first_outer_index"] is not None]
SOON = [
    r
    for r in FOUND
    if (r["problem"], r["method"], r["params"].get("tau", 2))
    in (
        ("bilinear", "RAPP", 2),
        ("forsaken_free", "APP", 5),
        ("quadratic", "EG", 2),
        ("quadratic", "LA-EG", 5),
    )
]


@pytest.mark.parametrize("row", some(FOUND, SOON))
def test_first_index(row):
    """Near the solution, of the methods that find it; else far away."""
    params, wanted = row["params"], row["first_outer_index"]
    applies = cases.applies_per_step(row["method"], params)
    solution = VECTORS["problems"][row["problem"]]["solution"]
    with cases.float64():
        walk = cases.walk(row["problem"], row["method"], params, row["z0"])

        def arrived():
            distance = np.linalg.norm(walk.point() - solution)
            if row["status"] == "conv":
                return distance < 1e-6
            return not distance <= 1e8  # or no number any more

        before = max(0, wanted - 2)
        walk.step(applies * before)
        assert not arrived()
        walk.step(applies * (wanted + 1 - before))
        assert arrived()


def test_gradient_steps_end_in_the_cycle_of_the_polar_game():
    name, rate = "polar_a1/3", 1.0 / VECTORS["problems"]["polar_a1/3"]["L"]
    with cases.float64():
        walk = cases.walk(name, "GDA", {"gamma": rate}, [1.0, 0.5])
        walk.step(3000)
        for _ in range(50):
            walk.step(1)
            assert 1.10 <= np.linalg.norm(walk.point()) <= 1.14


def test_the_bilinear_game_exactly():
    start = [1.0, 0.5]
    with cases.float64():
        walk = cases.walk(
            "bilinear", "LA-GDA", {"gamma": 1.0, "lambda": 0.2, "tau": 4}, start
        )
        walk.step(3)
        assert np.linalg.norm(walk.point()) > 1.0
        walk.step(1)
        # But for the one rounding of .2, where .2 * 5 is a fused product.
        np.testing.assert_allclose(walk.point(), [0.0, 0.0], atol=1e-16)
        for name, rate, growth in (("EG", 1.0, 1.0), ("GDA", 0.1, 1.01**0.5)):
            walk = cases.walk("bilinear", name, {"gamma": rate}, start)
            distance = np.linalg.norm(start)
            for _ in range(5):
                walk.step(cases.applies_per_step(name, {}))
                distance, before = np.linalg.norm(walk.point()), distance
                close(distance / before, growth, EXACT)


# Six digits of the closed forms.
RADII = [
    ("quadratic", "CEG+", {"gamma": 1 / 3, "alpha": 0.25}, 0.971825),
    ("quadratic", "CEG+", {"gamma": 1 / 3, "alpha": 0.5}, 1.105542),
    *[
        (game, "RAPP", {"gamma": rate, "lambda": 0.5, "tau": tau}, radius)
        for game, rate, tau, radius in (
            ("bilinear", 0.9, 1, 1.096586),
            ("bilinear", 0.9, 2, 0.746006),
            ("bilinear", 0.9, 3, 0.601112),
            ("bilinear", 0.9, 5, 0.998493),
            ("quadratic", 0.3, 2, 1.076116),
            ("quadratic", 0.3, 5, 0.895557),
        )
    ],
]


@pytest.mark.parametrize("game, name, params, radius", RADII)
def test_radius_of_the_test_games(game, name, params, radius):
    with cases.float64():
        walk = cases.walk(game, name, params, [1.0, 0.5])
        walk.step(3 * cases.applies_per_step(name, params))
        grown = np.linalg.norm(walk.point()) / np.linalg.norm([1.0, 0.5])
    assert grown ** (1 / 3) == pytest.approx(radius, abs=1e-6)


@pytest.mark.parametrize(
    "alpha", quick([0.02, 0.26, 0.5, 0.74, 0.98], lambda a: a in (0.26, 0.5))
)
def test_extragradient_is_stable_below_its_bound(alpha):
    """At the largest step exactly where 2 c + alpha < 1."""
    c = np.linspace(0.0, 0.6, 61)
    margin = 2 * c + alpha - 1.0
    with cases.float64():
        found = radii("CEG+", {"gamma": 1.0, "alpha": alpha}, c)
    clear = np.abs(margin) > 1e-9
    np.testing.assert_array_equal(found[clear] < 1.0, margin[clear] < 0.0)
    assert np.any(margin < 0.0) and np.any(margin > 0.0)


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
        for k in range(12):
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
    """Below 2 (1 + rho / gamma) = 6 / 7 on the quadratic game, c = .4."""
    field = linear(-0.4, (1 - 0.4**2) ** 0.5)
    for relaxation, stable in ((0.857, True), (0.8573, False)):
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

    # Rates that float32 holds too, so that TensorFlow rounds nothing.
    rate, last_bits = 0.125, 1e-15
    with cases.float64():
        extra = end(keras_stab.ExtraGradient(SGD(rate), 0.25), 6)
        close(end(keras_stab.RAPP(rate, 2, 0.25), 6), extra, last_bits)
        close(end(keras_stab.CEGPlus(rate, 0.25), 6), extra, last_bits)
        plain = end(SGD(rate), 6)
        assert np.abs(plain - extra).max() > 1e-3
        relaxed = end(keras_stab.RAPP(4 * rate, 1, 0.25), 6)
        close(relaxed, plain, last_bits)
        full = end(keras_stab.Lookahead(SGD(rate), 2, 1.0), 6)
        np.testing.assert_array_equal(full, plain)
        past = end(keras_stab.PastExtraGradient(SGD(rate)), 6)
        optimistic = keras_stab.OptimisticGradient(SGD(rate), "zero")
        close(past, end(optimistic, 6), last_bits)
        # A start outside of the set is projected, once.
        outside = keras_stab.RAPP(rate, 2, 0.5)
        assert np.abs(end(outside, 2, Box(-0.1, 0.1))).max() <= 0.1
