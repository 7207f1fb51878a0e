"""Aggregate: its rules by themselves, in training, and functions of one's own.

What every optimizer has to do is in the contract suite.
"""

import functools
import itertools
import json
from pathlib import Path

import contract
import keras
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from marks import ON_TORCH
from marks import quick
from marks import slow_but_on_torch
from scipy import optimize

import keras_stab
from keras_stab.backend import tracing
from keras_stab.numerics.aggregation import RULES
from keras_stab.numerics.aggregation import solve_rule
from keras_stab.numerics.min_norm import MinNormSolution

VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "aggregation.json").read_text()
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


# ---- The rules --------------------------------------------------------------


def in_step(rule, gram, **options):
    """As a compiled step solves, on every backend."""
    gram = keras.ops.convert_to_tensor(np.asarray(gram, "float32"))
    return solved(rule, gram, **options)


def on_host(rule, gram, **options):
    return solved(rule, np.asarray(gram, "float64"), **options)


# NumPy is the same beside every backend.
SOLVERS = quick([in_step, on_host], lambda solve: solve is in_step)


@functools.cache
def compiled(rule, nonfinite):
    """Once for a number of groups: otherwise each call compiles its loops."""

    def solve(gram, present, draws):
        return tuple(solve_rule(RULES[rule], gram, nonfinite, present, draws))

    def named(*arguments):
        return MinNormSolution(*tracing.as_kernel(solve)(*arguments))

    return named


def solved(rule, gram, nonfinite="drop", present=None, draws=None):
    groups = gram.shape[0]
    if present is None:
        present = np.ones(groups, bool)
    if draws is None:  # every group meets the others as they are numbered
        draws = np.tile(np.arange(groups) / groups, (groups, 1))
    if not isinstance(gram, np.ndarray):
        present = keras.ops.convert_to_tensor(present)
        draws = keras.ops.convert_to_tensor(draws.astype("float32"))
        if not ON_TORCH:
            return compiled(rule, nonfinite)(gram, present, draws)
    return solve_rule(RULES[rule], gram, nonfinite, present, draws)


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


def projections(vectors):
    """Of each vector on the cone of no conflict, by scipy's NNLS."""
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / norms[:, None]
    added = [optimize.nnls(units.T, -u, maxiter=9999)[0] for u in units]
    return norms[:, None] * (units + np.array(added) @ units)


@st.composite
def families(draw):
    """Vectors of different scales, angles and ranks."""
    groups = draw(st.sampled_from([2, 3, 5, 8, 32]))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    dimension = draw(st.sampled_from([3, groups, 5 * groups]))
    vectors = generator.normal(size=(groups, dimension))
    kind = draw(st.sampled_from(["plain", "around_0", "alike", "dependent"]))
    if kind == "around_0":
        vectors = vectors - vectors.mean(axis=0)
    elif kind == "alike":
        vectors = 1e-3 * vectors + vectors[0]
    elif kind == "dependent":
        vectors[-1] = vectors[:2].mean(axis=0) + 1e-5 * vectors[-1]
    spread = draw(st.sampled_from([0.0, 1.5]))
    scales = 10 ** generator.uniform(-spread, spread, size=(groups, 1))
    return vectors * scales


@settings(max_examples=40, deadline=None)
@given(families())
def test_upgrad_is_the_mean_of_projections(vectors):
    gram = vectors @ vectors.T
    solution = on_host("upgrad", gram)
    expected = projections(vectors).mean(axis=0)
    size = np.linalg.norm(vectors, axis=1).mean()
    # Of a residual r of squares, distances are known to its root.
    assert np.allclose(solution.weights @ vectors, expected, atol=1e-4 * size)
    assert solution.residual <= 1e-6
    assert np.isclose(
        solution.norm_squared, expected @ expected, atol=1e-3 * size**2
    )


@slow_but_on_torch
@settings(max_examples=20, deadline=None)
@given(families(), st.sampled_from(["upgrad", "min_norm"]))
def test_rules_that_conflict_with_no_group(vectors, rule):
    """The theorem: `<d, g_k> >= 0` for every k."""
    gram = vectors @ vectors.T
    norms = np.linalg.norm(vectors, axis=1)
    # In float32 nearly dependent vectors are those of no real problem.
    for solve, tolerance in ((on_host, 1e-6), (in_step, 1e-4)):
        weights = array(solve(rule, gram).weights)
        assert np.all(gram @ weights >= -tolerance * norms * norms.mean())


def by_surgery(vectors, order):
    """PCGrad as its paper writes it down, but for the mean at the end."""
    answer = []
    for i, vector in enumerate(vectors):
        vector = vector.copy()
        for j in order:
            other = vectors[j]
            if j != i and vector @ other < 0:
                vector = vector - (vector @ other) / (other @ other) * other
        answer.append(vector)
    return np.mean(answer, axis=0)


@pytest.mark.parametrize("solve", SOLVERS)
def test_pcgrad_and_its_expectation(solve):
    vectors = np.random.default_rng(5).normal(size=(4, 3))
    gram = vectors @ vectors.T
    orders = list(itertools.permutations(range(4)))
    surgeries, ours = [], []
    for order in orders:
        draws = np.tile(np.argsort(order) / 4, (4, 1))
        weights = array(solve("pcgrad", gram, draws=draws).weights)
        ours.append(weights @ vectors)
        surgeries.append(by_surgery(vectors, order))
        assert np.allclose(ours[-1], surgeries[-1], atol=1e-5)
    assert np.std(surgeries, axis=0).max() > 0.01  # the order matters
    drawn = np.random.default_rng(6).uniform(size=(400, 4, 4))
    drawn = [
        array(on_host("pcgrad", gram, draws=d).weights) @ vectors for d in drawn
    ]
    error = np.std(drawn, axis=0) / 20
    expected = np.mean(surgeries, axis=0)
    assert np.all(np.abs(np.mean(drawn, axis=0) - expected) <= 4 * error + 1e-9)


@slow_but_on_torch
@settings(max_examples=20, deadline=None)
@given(families())
def test_cagrad_is_the_best_in_its_ball(vectors):
    """The theorem, and weak duality: no d in the ball has a better worst."""
    gram, c = vectors @ vectors.T, 0.5
    mean = np.full(len(vectors), 1 / len(vectors))
    weights = array(on_host("cagrad", gram).weights)
    length = np.sqrt(max(mean @ gram @ mean, 0.0))
    change = weights - mean
    distance = np.sqrt(max(change @ gram @ change, 0.0))
    norms = np.linalg.norm(vectors, axis=1)
    assert distance <= c * length + 1e-5 * norms.mean()
    worst = (gram @ weights).min()
    assert worst >= (gram @ mean).min() - 1e-6 * norms.mean() * norms.max()
    if change.max() > 1e-6:
        convex = np.maximum(change, 0.0) / np.maximum(change, 0.0).sum()
        bound = convex @ gram @ mean + c * length * np.sqrt(
            max(convex @ gram @ convex, 0.0)
        )
        # Where gradients cancel the bound is 0 but for rounding.
        assert bound - worst <= 1e-4 * norms.mean() * norms.max()


def test_the_theorem_can_fail():
    gram = np.array([[1.0, -0.9], [-0.9, 100.0]])
    weights = np.asarray(on_host("mean", gram * [[1, 9], [9, 1]]).weights)
    assert np.any(gram * [[1, 9], [9, 1]] @ weights < -0.1)


@pytest.mark.parametrize("groups", [1, 2, 4, 5])
def test_upgrad_by_enumeration(groups):
    """Two references that know nothing of each other."""
    vectors = np.random.default_rng(groups).normal(size=(groups, 3))
    weights = reference.upgrad_by_enumeration(vectors @ vectors.T)
    expected = projections(vectors).mean(axis=0)
    assert np.allclose(weights @ vectors, expected, atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_groups_that_agree_get_the_mean(solve):
    vectors = np.random.default_rng(0).normal(size=(4, 9)) + 2.0
    for rule in ("upgrad", "mean"):
        solution = solve(rule, vectors @ vectors.T)
        assert np.allclose(array(solution.weights), 0.25, atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_min_norm_is_the_solver_of_grain(solve):
    vectors = np.random.default_rng(1).normal(size=(5, 9))
    gram = vectors @ vectors.T
    if solve is in_step:
        gram = keras.ops.convert_to_tensor(gram.astype("float32"))
    expected = keras_stab.min_norm_weights(gram).weights
    weights = solved("min_norm", gram).weights
    np.testing.assert_allclose(array(weights), array(expected), atol=1e-5)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("rule", RULES)
def test_groups_that_take_no_part(rule, solve):
    """As if they were not there; a zero gradient counts in a mean."""
    vectors = np.random.default_rng(2).normal(size=(6, 9))
    vectors[4] = 0.0
    gram = vectors @ vectors.T
    gram[1] = gram[:, 1] = np.nan
    present = np.array([True, True, False, True, True, True])
    solution = solve(rule, gram, present=present)
    left = [0, 3, 4, 5]
    expected = solve(rule, gram[np.ix_(left, left)])
    weights = array(solution.weights)
    assert np.all(weights[[1, 2]] == 0)
    direction = weights @ np.nan_to_num(vectors)
    wanted = array(expected.weights) @ vectors[left]
    assert np.allclose(direction, wanted, atol=1e-5)
    assert np.isclose(array(solution.norm_squared), wanted @ wanted, rtol=1e-4)
    solution = solve(rule, gram, nonfinite="propagate", present=present)
    weights = array(solution.weights)
    assert np.allclose(weights, np.where(present, 0.2, 0.0))
    nothing = solve(rule, np.full((3, 3), np.nan))
    assert np.all(array(nothing.weights) == 0)
    assert np.all(array(solve(rule, np.zeros((3, 3))).residual) == 0)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("rule", RULES)
def test_scale_changes_nothing(rule, solve):
    vectors = np.random.default_rng(3).normal(size=(5, 9))
    vectors *= 10.0 ** np.arange(-2, 3)[:, None]
    gram = vectors @ vectors.T
    weights = array(solve(rule, gram).weights)
    for factor in (1e-16, 1e16):
        again = array(solve(rule, gram * factor).weights)
        np.testing.assert_allclose(again, weights, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["id"])
def test_published_package(case, solve):
    """Its own example, and others in the plane and in space."""
    jacobian = np.array(case["jacobian"])
    size = np.abs(jacobian).max()
    for rule, expected in case["aggregations"].items():
        weights = array(solve(rule, jacobian @ jacobian.T).weights)
        direction, expected = weights @ jacobian, np.array(expected)
        if rule == "min_norm":
            shorter = np.linalg.norm(expected) + 1e-5 * size
            assert np.linalg.norm(direction) <= shorter
        elif rule == "pcgrad":
            np.testing.assert_allclose(
                2 * direction, expected, atol=1e-5 * size
            )
        else:
            np.testing.assert_allclose(direction, expected, atol=1e-3 * size)


# ---- In training ------------------------------------------------------------


def trained(optimizer, batches=4, **arguments):
    x, y = contract.data(batches)
    model = contract.compiled(optimizer, **arguments)
    contract.fit(model, x, y)
    return model


@pytest.mark.parametrize("arguments", [{}, {"across": "batches"}])
def test_min_norm_is_grain(arguments):
    """To the last bit, with momentum and decay inside."""
    states = []
    for method in (
        keras_stab.GRAIN(contract.INNER["adamw"](), groups=4, **arguments),
        keras_stab.Aggregate(
            contract.INNER["adamw"](), "min_norm", groups=4, **arguments
        ),
    ):
        states.append(contract.state(trained(method)))
    contract.assert_same_bits(*states)


def test_the_mean_is_the_plain_step():
    states = []
    for method in (
        keras.optimizers.SGD(0.1),
        keras_stab.Aggregate(keras.optimizers.SGD(0.1), "mean", groups=4),
    ):
        x, y = contract.data(4)
        keras.utils.set_random_seed(3)
        dense = keras.layers.Dense(contract.CLASSES)
        model = keras.Sequential([keras.Input((contract.FEATURES,)), dense])
        contract.fit(contract.compiled(method, model), x, y)
        states.append(model.get_weights())
    for one, other in zip(*states):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_figures_of_a_step():
    optimizer = keras_stab.Aggregate("sgd", "upgrad", groups=4)
    trained(optimizer)
    figures = optimizer.stability_metrics()
    assert len(figures["weights"]) == 4 and sum(figures["weights"]) >= 1
    assert 0 <= figures["residual"] <= 1e-6
    # It may be longer than the mean, as the shortest combination is not.
    assert figures["norm_ratio"] > 0 and figures["excluded"] == 0


def test_groups_across_batches():
    """Only `apply`: the gradients are the groups."""
    vectors = np.array([[1.0, 0.0], [-1.0, 1.0]])
    point = keras.Variable(np.zeros(2), dtype="float32")
    optimizer = keras_stab.Aggregate(
        keras.optimizers.SGD(1.0), "upgrad", groups=2, across="batches"
    )
    optimizer.build([point])
    for vector in vectors:
        optimizer.apply([keras.ops.convert_to_tensor(vector, "float32")])
    # Projections: (1, 0) becomes (1/2, 1/2), (-1, 1) becomes (0, 1).
    np.testing.assert_allclose(np.array(point), [-0.25, -0.75], atol=1e-5)


def test_orders_of_pcgrad_are_a_matter_of_the_seed(tmp_path):
    """New ones at every step, the same for a seed, and saved."""
    x, y = contract.data(6)

    def run(seed, first=6):
        rows = first * contract.BATCH
        optimizer = keras_stab.Aggregate(
            keras.optimizers.SGD(0.5), "pcgrad", groups=8, seed=seed
        )
        model = contract.compiled(optimizer, contract.classifier(dropout=False))
        contract.fit(model, x[:rows], y[:rows])
        if first < 6:
            model.save(tmp_path / "model.keras")
            model = keras.models.load_model(tmp_path / "model.keras")
            contract.fit(model, x[rows:], y[rows:])
        assert array(model.optimizer.variables[2]).tolist() == [seed or 0, 6]
        return contract.state(model)

    whole = run(1)
    contract.assert_same_bits(whole, run(1, first=3))
    assert any(np.any(a != b) for a, b in zip(whole, run(None)))


# ---- Functions of one's own -------------------------------------------------


def test_a_function_is_saved_and_loaded(tmp_path):
    optimizer = keras_stab.Aggregate("sgd", contract.by_size, groups=2)
    model = trained(optimizer)
    assert optimizer.diagnostics()["residual"] == 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.rule is contract.by_size
    contract.assert_same_bits(
        *([array(v) for v in m.optimizer.variables] for m in (model, loaded))
    )


def test_a_function_sees_tidy_groups():
    """Zeros for a group of NaN, and its weight does not count."""
    seen = []

    def rule(gram, sizes):
        seen.append((array(gram), array(sizes)))
        return keras.ops.ones_like(sizes)

    point = keras.Variable(np.zeros(2), dtype="float32")
    optimizer = keras_stab.Aggregate(keras.optimizers.SGD(1.0), rule, groups=2)
    optimizer.build([point])
    gram = keras.ops.convert_to_tensor([[4.0, np.nan], [np.nan, np.nan]])
    present = keras.ops.ones(2, "bool")
    weights, _ = optimizer.solve(gram, present, "drop", 16.0, [8, 8])
    np.testing.assert_array_equal(array(weights), [1.0, 0.0])
    np.testing.assert_array_equal(seen[0][0], [[4.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(seen[0][1], [8.0, 0.0])


def not_k_weights(gram):
    return gram


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"rule": "median"}, "rule"),
        ({"rule": 3}, "rule"),
        ({"rule": lambda: 1}, "function \\(gram\\)"),
        ({"rule": lambda gram, sizes, rows: 1}, "function \\(gram, sizes\\)"),
        ({"rule": "mean", "c": 0.5}, "rule='cagrad' only"),
        ({"rule": "cagrad", "c": 1.0}, "`c`"),
        ({"rule": "cagrad", "seed": 1}, "rule='pcgrad' only"),
        ({"rule": "pcgrad", "seed": -1}, "`seed`"),
        ({"groups": 65}, "1 to 64"),
        ({"zero_groups": "exclude"}, "did you mean `groups`"),
        ({"learning_rate": 0.1}, "AdamW\\(learning_rate=0.1\\)"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        keras_stab.Aggregate("adamw", **arguments)


def test_a_function_must_return_k_weights():
    optimizer = keras_stab.Aggregate("sgd", not_k_weights, groups=2)
    with pytest.raises(ValueError, match="one weight for each group"):
        trained(optimizer)


def test_a_gradient_method_inside():
    with pytest.raises(ValueError, match="optimizer inside Aggregate"):
        keras_stab.Aggregate(keras_stab.GRAIN("sgd"))
