"""The test games, and the methods on them through Game."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stab
from keras_stab import games

VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "rapp.json").read_text()
)
MAKERS = {
    "bilinear": games.bilinear,
    "bilinear_shift_box": lambda: games.bilinear(0.9, radius=1.0),
    "quadratic": games.quadratic,
    "quadratic_box": lambda: games.quadratic(radius=1.1),
    "polar_a1/3": games.polar,
    "polar_a3/4": lambda: games.polar(0.75),
    "polar_a1": lambda: games.polar(1.0),
    "global_forsaken_ball": games.global_forsaken,
    "forsaken_box": games.forsaken,
    "forsaken_free": lambda: games.forsaken(radius=None),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_known(name):
    problem, row = MAKERS[name](), VECTORS["problems"][name]
    for z in ((1, 0.5), (-0.3, 0.7)):
        known = row[f"F_at_({z[0]},{z[1]})"]
        np.testing.assert_allclose(problem.operator(z), known, atol=1e-15)
    np.testing.assert_allclose(problem.solution, row["solution"])
    np.testing.assert_allclose(problem.operator(problem.solution), 0, atol=1e-9)
    if name == "forsaken_free":  # no longer Lipschitz
        assert problem.L == np.inf and np.isnan(problem.rho)
        return
    assert problem.L == pytest.approx(row["L"], rel=1e-12)
    assert problem.rho == pytest.approx(row["rho_weak_minty"], rel=1e-12)
    # The constants hold at points of the domain.
    random = np.random.default_rng(0)
    z = [problem.project(z) for z in random.uniform(-1.5, 1.5, (200, 2))]
    fields = [problem.operator(each) for each in z]
    for a, b, f, g in zip(z, z[1:], fields, fields[1:]):
        assert np.linalg.norm(f - g) <= problem.L * np.linalg.norm(a - b) + 1e-9
        assert f @ (a - problem.solution) >= problem.rho * f @ f - 1e-9
    np.testing.assert_array_equal(problem.project(problem.start), problem.start)


def test_bad_problems():
    for make, message in (
        (lambda: games.quadratic(L=3.0, rho=-0.5), "at most 1 / L in size"),
        (lambda: games.quadratic(L=0.0), "`L` must be above 0"),
        (lambda: games.bilinear(radius=-1.0), "`radius` must be at least"),
        (lambda: games.polar("a"), "`a` must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def method(name, gamma, alpha=None, tau=1, **rest):
    """The optimizer of a row, and its gradients per outer step."""
    step = rest.get("lambda")
    if name == "GDA":
        return keras.optimizers.SGD(gamma), 1
    if name in ("RAPP", "APP"):
        return keras_stab.RAPP(gamma, inner_steps=tau, relaxation=step), tau
    if name == "P2-EG+":
        inner = keras.optimizers.SGD(gamma)
        return keras_stab.ExtraGradient(inner, update_scale=alpha), 2
    if name in ("EG", "CEG+"):
        return keras_stab.CEGPlus(gamma, alpha=alpha), 2
    base, evaluations = method(name.removeprefix("LA-"), gamma, alpha)
    lookahead = keras_stab.Lookahead(base, sync_period=tau, slow_step_size=step)
    return lookahead, evaluations * tau


def row_name(row):
    return row["id"].replace("|", " ")


QUICK = (
    "bilinear|GDA|z0=1,0.5|gamma=0.1",
    "bilinear_shift_box|RAPP|",
    "quadratic|EG|",
    "quadratic_box|CEG+|",
    "polar_a1/3|P2-EG+|",
    "global_forsaken_ball|CEG+|",
    "forsaken_box|LA-GDA|z0=1,1|gamma=0.3",
    "quadratic|LA-CEG+|",
)


def chosen():
    """One row of each method unmarked, all the others as slow tests."""
    wanted = list(QUICK)
    for row in VECTORS["trajectories"]:
        start = next((w for w in wanted if row["id"].startswith(w)), None)
        if start:
            wanted.remove(start)
        marks = () if start else pytest.mark.slow
        yield pytest.param(row, id=row_name(row), marks=marks)
    assert not wanted, wanted


def follow(problem, optimizer, evaluations, outer_steps):
    problem.game.compile(optimizer)
    for _ in range(outer_steps):
        for _ in range(evaluations):
            problem.game.train_on_batch(problem.steps(1))
        yield problem.point


@pytest.mark.parametrize("row", list(chosen()))
@pytest.mark.filterwarnings("ignore:relaxation=1")
def test_trajectories(row):
    problem = MAKERS[row["problem"]]()
    problem.point = row["z0"]
    optimizer, evaluations = method(row["method"], **row["params"])
    known = [z for z in row["z_1_to_10"] if z[0] is not None]
    path = follow(problem, optimizer, evaluations, len(known))
    for z, right in zip(path, known):
        size = max(1.0, np.linalg.norm(right))
        if not size < 1e6:
            break
        np.testing.assert_allclose(z, right, rtol=0, atol=1e-4 * size)


def test_a_rapp_for_each_player_is_one_for_all():
    row = next(
        r
        for r in VECTORS["trajectories"]
        if r["problem"] == "bilinear_shift_box" and r["method"] == "RAPP"
    )
    problem = MAKERS[row["problem"]]()
    tau = row["params"]["tau"]
    parts = {name: method("RAPP", **row["params"])[0] for name in "xy"}
    path = list(follow(problem, parts, tau, 5))
    np.testing.assert_allclose(path, row["z_1_to_10"][:5], atol=1e-4)
    turns = keras_stab.Game(problem.game.players, turns=("x", "y"))
    for joint in (keras_stab.RAPP(), keras_stab.CEGPlus()):
        with pytest.raises(ValueError, match="Give each player its own"):
            turns.compile(joint)


def test_slow_weights_are_evaluated():
    """RAPP inside a cycle: the model looks ahead, evaluation does not."""
    problem = games.bilinear()
    problem.game.compile(keras_stab.RAPP(0.5, inner_steps=3))
    problem.game.fit(problem.steps(2), batch_size=1, verbose=0)
    assert not np.allclose(problem.point, problem.start)
    logs = problem.game.evaluate(
        problem.steps(1),
        verbose=0,
        return_dict=True,
        callbacks=[keras_stab.SwapSlowWeights()],
    )
    assert logs["x_loss"] == logs["y_loss"] == pytest.approx(0.5)
    with problem.game.optimizer.swap_weights(problem.game):
        np.testing.assert_array_equal(problem.point, problem.start)
