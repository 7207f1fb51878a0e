"""The adaptive step of CEGPlus: the rule, its theorem, what is refused."""

import interpolation_cases as cases
import keras
import numpy as np
import pytest
import small_games
from interpolation_cases import BACKEND
from interpolation_cases import VECTORS
from marks import quick
from marks import slow_but_on_torch

import keras_stab
from keras_stab.constraints import Box

# On TensorFlow rates pass through float32.
EXACT = 1e-6 if BACKEND == "tensorflow" else 1e-12


def adaptive(rate, delta=0.0, theta=1.0, **arguments):
    return keras_stab.CEGPlus(
        rate, "adaptive", minty_constant=delta, relaxation=theta, **arguments
    )


def projected(problem, z):
    domain = cases.DOMAINS.get(problem)
    if domain is None:
        return z
    if isinstance(domain, Box):
        return np.clip(z, domain.lower, domain.upper)
    return z * min(1.0, domain.radius / np.linalg.norm(z))


def rule(field, project, z, gamma, delta, theta):
    """One step as the paper has it; z+, z bar, alpha and H z bar - H z."""
    before = z - gamma * field(z)
    ahead = project(before)
    change = ahead - gamma * field(ahead) - before
    alpha = delta / gamma + (ahead - z) @ change / (change @ change)
    return z + theta * alpha * change, ahead, alpha, change


def on_game(problem):
    """Field and projection of a test game, for `rule`."""
    field = cases.FIELDS[problem]
    return (
        lambda z: np.array(field(z[0], z[1])),
        lambda z: projected(problem, z),
    )


# gamma and delta in units of 1/L.
SETTINGS = [
    ("bilinear", 0.9, 0.0, 1.0),
    ("bilinear_shift_box", 0.9, 0.0, 1.5),
    ("quadratic", 1.0, -1 / 3, 1.0),
    ("quadratic_box", 0.9, -1 / 3, 1.2),
    ("polar_a1/3", 1.0, -1 / 3, 1.5),
    ("global_forsaken_ball", 1.0, 0.0, 1.0),
]


@pytest.mark.parametrize("problem, gamma, delta, theta", SETTINGS)
def test_steps_are_those_of_the_paper(problem, gamma, delta, theta):
    """Two variables: the inner products are over both."""
    lipschitz = VECTORS["problems"][problem]["L"]
    gamma, delta = gamma / lipschitz, delta / lipschitz
    domain = cases.DOMAINS.get(problem)
    ball = domain is not None and not isinstance(domain, Box)
    field, project = on_game(problem)
    z = np.array([1.0, 0.5])
    with cases.float64():
        # A ball does not fall into two sets, one per variable.
        parts = [z] if ball else list(z)
        pair = [keras.Variable(part, dtype="float64") for part in parts]
        for variable in pair:
            variable.constraint = domain
        optimizer = adaptive(gamma, delta, theta)

        def point():
            return np.concatenate([np.ravel(v.numpy()) for v in pair])

        def apply():
            gradient = field(point())
            parts = [gradient] if ball else list(gradient)
            optimizer.apply(
                [keras.ops.convert_to_tensor(g, "float64") for g in parts],
                pair,
            )

        for _ in range(12):
            z, ahead, alpha, _ = rule(field, project, z, gamma, delta, theta)
            apply()
            np.testing.assert_allclose(point(), ahead, rtol=0, atol=EXACT)
            apply()
            np.testing.assert_allclose(point(), z, rtol=0, atol=EXACT)
            told = optimizer.diagnostics()["alpha"]
            assert told == pytest.approx(alpha, abs=1e2 * EXACT)


# Problem, gamma L, delta L, theta, first index below 1e-6 in NumPy. Behind the
# table of `guides/cards/games.md`, which counts gradients.
FOUND = [
    ("bilinear", 1.0, 0.0, 1.0, 41),
    # With alpha = 1, extragradient, it stays 0.1 away.
    ("bilinear_shift_box", 1.0, 0.0, 1.0, 40),
    # c = 1/3: alpha = 0.5 diverges, 0.25 takes 488.
    ("quadratic", 1.0, -1 / 3, 1.0, 362),
    ("quadratic_box", 1.0, -1 / 3, 1.0, 357),
    # alpha = 0.5 takes 624.
    ("polar_a1/3", 1.0, -1 / 3, 1.5, 367),
    # alpha = 1 ends in a cycle, 0.5 takes 1233.
    ("polar_a3/4", 1.0, -1 / 3, 1.0, 995),
    ("global_forsaken_ball", 1.0, 0.0, 1.5, 39),
]


# The same for alpha = 1, 0.5 and 0.25, where there is one.
FIXED = {
    "bilinear": (None, 41, 60),
    "bilinear_shift_box": (None, 40, 62),
    "quadratic": (None, None, 488),
    "polar_a1/3": (368, 624, 1169),
    "polar_a3/4": (None, 1233, 2258),
    "global_forsaken_ball": (54, 104, 207),
}


def index_below(problem, gamma, delta, theta, fixed=None):
    field, project = on_game(problem)
    z = np.array([1.0, 0.5])
    solution = VECTORS["problems"][problem]["solution"]
    for index in range(1, 3000):
        start = z
        z, _, _, change = rule(field, project, z, gamma, delta, theta)
        if fixed:
            z = start + fixed * change
        if not np.linalg.norm(z) < 1e6:
            return None
        if np.linalg.norm(z - solution) < 1e-6:
            return index
    return None


@pytest.mark.parametrize(
    "problem, gamma, delta, theta, wanted",
    quick(FOUND, everywhere=lambda case: case[0] == "bilinear_shift_box"),
)
def test_first_index_near_the_solution(problem, gamma, delta, theta, wanted):
    lipschitz = VECTORS["problems"][problem]["L"]
    gamma, delta = gamma / lipschitz, delta / lipschitz
    assert index_below(problem, gamma, delta, theta) == wanted
    solution = VECTORS["problems"][problem]["solution"]
    with cases.float64():
        walk = cases.Walk(
            adaptive(gamma, delta, theta),
            cases.FIELDS[problem],
            [1.0, 0.5],
            cases.DOMAINS.get(problem),
        )
        walk.step(2 * (wanted - 2))
        assert np.linalg.norm(walk.point() - solution) >= 1e-6
        walk.step(6)
        assert np.linalg.norm(walk.point() - solution) < 1e-6


@slow_but_on_torch
def test_what_fixed_steps_take():
    for problem, wanted in FIXED.items():
        gamma = 1.0 / VECTORS["problems"][problem]["L"]
        found = [
            index_below(problem, gamma, 0.0, 1.0, fixed)
            for fixed in (1.0, 0.5, 0.25)
        ]
        assert tuple(found) == wanted, problem


def test_a_minty_constant_above_that_of_the_game_diverges():
    """The half-space does not hold the solution then."""
    gamma = 1.0 / VECTORS["problems"]["quadratic"]["L"]
    with cases.float64():
        walk = cases.Walk(
            adaptive(gamma), cases.FIELDS["quadratic"], [1.0, 0.5]
        )
        walk.step(200)
        assert np.linalg.norm(walk.point()) > 10.0


def test_the_step_has_a_lower_bound_and_leads_towards_the_solution():
    r"""For gamma L <= 1 and delta <= rho, in random linear games in a box.

    $\alpha \ge \delta / \gamma + 1 / (1 + \gamma L)$, and the square of the
    distance falls by $\theta (2 - \theta) \alpha^2 \|H \bar z - H z\|^2$.
    """
    generator = np.random.default_rng(8)
    tight = np.inf
    with cases.float64():
        for trial in range(24):
            matrix = generator.normal(size=(6, 6))
            matrix -= 0.5 * (1 + trial % 2) * matrix.T
            # Monotone, and at times skew: then the bound is met.
            shift = np.linalg.eigvalsh(matrix + matrix.T)[0] / 2
            matrix -= min(shift, 0.0) * np.eye(6)
            matrix /= np.linalg.norm(matrix, 2)
            gamma = generator.uniform(0.3, 1.0)
            theta = generator.uniform(0.2, 1.8)
            delta = -0.4 * gamma * generator.uniform()
            side = 10.0 if trial % 3 else 0.7
            z = generator.normal(size=6)
            point = keras.Variable(z, dtype="float64")
            optimizer = adaptive(gamma, delta, theta, proximal=Box(-side, side))
            change = 0.0
            for _ in range(2):
                gradient = matrix @ point.numpy()
                ahead = point.numpy() - gamma * gradient
                change = ahead - change
                tensor = keras.ops.convert_to_tensor(gradient, "float64")
                optimizer.apply([tensor], [point])
            alpha = optimizer.diagnostics()["alpha"]
            bound = delta / gamma + 1.0 / (1.0 + gamma)
            assert alpha >= bound - 10 * EXACT
            tight = min(tight, alpha - bound)
            fall = theta * (2.0 - theta) * alpha**2 * (change @ change)
            distance = np.sum(np.square(point.numpy()))
            assert distance <= z @ z - fall + 10 * EXACT
    assert tight < 0.1


# ---- Edges ----------------------------------------------------------------


def applied_twice(optimizer, gradients, start=(1.0, 0.5)):
    pair = [keras.Variable(z, name=n) for z, n in zip(start, "xy")]
    for values in gradients:
        optimizer.apply(
            [keras.ops.convert_to_tensor(float(g)) for g in values], pair
        )
    return [float(v.numpy()) for v in pair]


@pytest.mark.filterwarnings("ignore:The last step")
@pytest.mark.parametrize("rate, gradient", [(0.1, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("delta", [0.0, -0.01])
def test_nothing_to_measure_is_no_step(rate, gradient, delta):
    """At a solution, and at the start of a warm-up, 0 / 0 would be NaN."""
    optimizer = adaptive(rate, delta)
    point = applied_twice(optimizer, [(gradient, gradient)] * 2)
    assert point == [1.0, 0.5]
    assert optimizer.diagnostics() == {"alpha": 0.0}


def test_no_gradient_that_is_nan_leaves_the_weights_as_they_are():
    for at in (0, 1):
        gradients = [[1.0, 0.5], [0.5, 1.0]]
        gradients[at] = [np.nan, 1.0]
        assert np.all(np.isnan(applied_twice(adaptive(0.1), gradients)))


def test_a_step_that_turns_back_is_told():
    """Beyond 1/L, here 2/L in the game x y with L = 1."""
    optimizer = adaptive(2.0)
    walk = cases.Walk(optimizer, cases.FIELDS["bilinear"], [1.0, 0.5])
    walk.step(2)
    # Here a = -2 F z and b = a - 2 F a: <a, b> = |a|^2, |b|^2 = 5 |a|^2.
    assert optimizer.diagnostics()["alpha"] == pytest.approx(0.2)
    metrics = optimizer.stability_metrics()
    assert metrics["alpha"] == pytest.approx(0.2)
    with pytest.warns(UserWarning, match="may turn back"):
        adaptive(1.0, -0.5)
    optimizer = adaptive(2.0, -0.8)
    walk = cases.Walk(optimizer, cases.FIELDS["bilinear"], [1.0, 0.5])
    walk.step(2)
    with pytest.warns(UserWarning, match="did not go forward"):
        assert optimizer.diagnostics()["alpha"] == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"alpha": "other"}, "alpha"),
        ({"alpha": 0.5, "relaxation": 1.5}, "belong to"),
        ({"alpha": 0.5, "minty_constant": -0.01}, "belong to"),
        ({"relaxation": 0.0}, "relaxation"),
        ({"relaxation": 2.0}, "relaxation"),
        ({"minty_constant": "rho"}, "minty_constant"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_stab.CEGPlus(0.1, **{"alpha": "adaptive", **arguments})


def test_diagnostics_of_a_number_are_refused():
    for optimizer in (keras_stab.CEGPlus(0.1), adaptive(0.1)):
        with pytest.raises(ValueError, match="that has trained"):
            optimizer.diagnostics()


def test_one_player_alone_has_no_adaptive_step():
    """It would be another method; all players together are one step."""
    each = {"D": adaptive(0.1), "G": "sgd"}
    around = {"D": keras_stab.Lookahead(adaptive(0.1)), "G": "sgd"}
    for optimizers in (each, around):
        with pytest.raises(ValueError, match="one joint CEGPlus"):
            small_games.make_gan().compile(optimizer=optimizers)
    with pytest.raises(ValueError, match="take turns"):
        small_games.make_gan(turns=("D", "G")).compile(adaptive(0.1))
    game = small_games.make_gan()
    game.compile(optimizer=adaptive(0.05))
    game.fit(small_games.points(), batch_size=16, epochs=2, verbose=0)
    assert np.isfinite(game.optimizer.diagnostics()["alpha"])
