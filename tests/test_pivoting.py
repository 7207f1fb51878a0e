"""Block pivoting on the host, against the interior point method."""

import keras
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from marks import slow_but_on_torch

from keras_stab import min_norm_weights
from keras_stab.numerics import pivoting
from keras_stab.numerics.gram_measures import gram_measures
from keras_stab.numerics.interior_point import Problem
from keras_stab.numerics.interior_point import iterate_on_host
from keras_stab.numerics.min_norm import solve_min_norm


def scaled(gram):
    root = np.sqrt(np.diagonal(gram))
    correlation = np.clip(gram / np.outer(root, root), -1.0, 1.0)
    np.fill_diagonal(correlation, 1.0)
    scale = root.min() / root
    matrix = correlation + np.outer(scale, scale)
    return Problem(correlation, scale, matrix, np.ones(len(gram), bool))


@st.composite
def grams(draw):
    """Well and ill conditioned, nearly dependent; of either precision."""
    groups = draw(st.sampled_from([3, 4, 8, 17, 32, 64]))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    dimension = draw(st.sampled_from([groups - 1, groups, 5 * groups, 500]))
    vectors = generator.normal(size=(groups, dimension))
    kind = draw(st.sampled_from(["plain", "around_0", "alike", "dependent"]))
    if kind == "around_0":
        vectors -= vectors.mean(axis=0)
    elif kind == "alike":
        vectors = 10 ** draw(st.floats(-6, 0)) * vectors + vectors[0]
    elif kind == "dependent":
        nearby = 10 ** draw(st.floats(-9, 0))
        vectors[-1] = vectors[:2].mean(axis=0) + nearby * vectors[-1]
    spread = draw(st.sampled_from([0.0, 0.3, 2.5]))
    vectors *= 10 ** generator.uniform(-spread, spread, size=(groups, 1))
    gram = vectors @ vectors.T
    return gram.astype(draw(st.sampled_from(["float32", "float64"])))


@slow_but_on_torch
@settings(max_examples=100, deadline=None)
@given(grams())
def test_agrees_with_the_interior_point(gram):
    precision = str(gram.dtype)
    answer = min_norm_weights(gram)
    weights, gram = np.asarray(answer.weights), gram.astype("float64")
    assert np.all(weights >= 0) and abs(weights.sum() - 1) < 1e-12
    iterated = iterate_on_host(scaled(gram), precision)
    value, other = (w @ gram @ w for w in (weights, iterated))
    norms = np.sqrt(np.diagonal(gram))
    unit = norms.min() * norms.max()
    # As float32 rounds them, vectors that depend on each other are those of
    # no real problem: neither solver has a better certificate then.
    matrix = gram / np.outer(norms, norms) + np.outer(1 / norms, 1 / norms) * (
        norms.min() ** 2
    )
    if np.linalg.eigvalsh(matrix)[0] > 1e-12:
        assert reference.certificate(gram, weights) <= 1e-10
        assert abs(value - other) <= 1e-9 * unit
        assert value - (gram @ weights).min() <= 1e-9 * np.diagonal(gram).mean()
    pivoted = pivoting.solve_by_pivoting(scaled(gram), precision)
    if pivoted is None:  # nearly dependent: not a matter of rounding
        assert np.allclose(weights, iterated, atol=1e-6)
    else:
        assert np.allclose(weights, pivoted, rtol=1e-9, atol=1e-14)


@slow_but_on_torch
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_equal_groups_share_their_weight(precision):
    generator = np.random.default_rng(1)
    for groups in (3, 8, 40):
        vectors = generator.normal(size=(groups, 100))
        vectors[-1] = vectors[0]
        gram = (vectors @ vectors.T).astype(precision)
        weights = min_norm_weights(gram).weights
        assert np.isclose(weights[0], weights[-1], rtol=1e-2)
        alone = min_norm_weights(gram[1:, 1:]).weights
        assert np.isclose(weights[0] + weights[-1], alone[-1], atol=1e-6)


@slow_but_on_torch
def test_it_needs_no_iteration_where_groups_are_independent(monkeypatch):
    def refuse(*_):
        raise AssertionError("the interior point was asked")

    monkeypatch.setattr(pivoting, "iterate_on_host", refuse)
    generator = np.random.default_rng(2)
    for groups in (3, 8, 16, 64):
        vectors = generator.normal(size=(groups, 300))
        vectors += generator.normal(size=300)
        vectors *= np.exp(generator.normal(size=(groups, 1)))
        solution = min_norm_weights((vectors @ vectors.T).astype("float32"))
        # Not the case in which all groups have a weight.
        assert groups == 3 or np.any(solution.weights == 0)
        assert solution.residual <= 1e-12


@slow_but_on_torch
def test_it_remembers_nothing():
    generator = np.random.default_rng(3)
    problems = [
        (v @ v.T).astype("float32") for v in generator.normal(size=(9, 8, 30))
    ]
    there = [min_norm_weights(g).weights for g in problems]
    back = [min_norm_weights(g).weights for g in reversed(problems)]
    for one, other in zip(there, reversed(back)):
        np.testing.assert_array_equal(one, other)


@slow_but_on_torch
@pytest.mark.parametrize("zero_groups", ["exclude", "literal"])
@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
@pytest.mark.parametrize(
    "bad, absent",
    [((), ()), ((1,), ()), ((), (0, 4)), ((2,), (1,)), ((1,), (1,))],
)
@pytest.mark.parametrize("zero", [(), (3,), (0, 1, 2, 3, 4)])
def test_host_and_device_follow_the_same_rules(
    zero_groups, nonfinite, bad, absent, zero
):
    vectors = np.random.default_rng(4).normal(size=(5, 50)) + 0.1
    vectors[list(zero)] = 0.0
    gram = vectors @ vectors.T
    for k in bad:
        gram[k] = gram[:, k] = np.nan
    present = np.array([k not in absent for k in range(5)])
    expected = min_norm_weights(gram, zero_groups, nonfinite, present)
    tensor = keras.ops.convert_to_tensor(gram.astype("float32"))
    there = keras.ops.convert_to_tensor(present)
    solution = solve_min_norm(tensor, zero_groups, nonfinite, there)
    for one, other in zip(solution, expected):
        one = keras.ops.convert_to_numpy(one)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    figures = gram_measures(tensor, solution, there, 20.0)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(figures),
        gram_measures(gram, expected, present, 20.0),
        rtol=1e-3,
        atol=1e-5,
    )
