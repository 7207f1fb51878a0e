"""The K x K solver: vectors, invariants, degenerate problems."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import reference
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_stab import min_norm_weights
from keras_stab.numerics.gram_measures import GROUP_MEASURES
from keras_stab.numerics.gram_measures import gram_measures
from keras_stab.numerics.min_norm import solve_min_norm

VECTORS = json.loads(
    (Path(__file__).parent / "vectors" / "grain.json").read_text()
)
PROBLEMS = VECTORS["exact"] + VECTORS["problems"]


def in_step(gram, **options):
    """As a train step solves: compiled, or (PyTorch) on the host."""
    gram = keras.ops.convert_to_tensor(np.asarray(gram, "float32"))
    return min_norm_weights(gram, **options)


def on_host(gram, **options):
    return min_norm_weights(np.asarray(gram, "float64"), **options)


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


@pytest.mark.parametrize("solve", [in_step, on_host])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p["id"])
def test_vectors(problem, solve):
    gram = np.array(problem["gram"], "float64")
    tolerance = problem["tolerance"]
    solution = solve(gram)
    weights = array(solution.weights)
    assert np.all(weights >= 0) and abs(weights.sum() - 1) <= 1e-6
    weights = weights / weights.sum()
    limit = tolerance["kkt"] if solve is in_step else 1e-9
    residual = reference.certificate(gram, weights)
    assert residual <= limit
    assert abs(float(solution.residual) - residual) <= 1e-6
    norm_squared = weights @ gram @ weights
    # The duality gap that the issue asks for, of the mean diagonal.
    counted = np.diag(gram) > 1e-14 * np.diag(gram).max()
    gap = norm_squared - (gram @ weights)[counted].min()
    assert gap <= 1e-6 * np.diag(gram).mean()
    if tolerance.get("norm_squared") is not None:
        error = norm_squared - problem["norm_squared"]
        assert error <= tolerance["norm_squared"]
    if tolerance["weights"] is not None and problem["weights_unique"]:
        error = np.abs(weights - problem["weights"]).max()
        assert error <= tolerance["weights"]
    if "direction" in problem:
        direction = weights @ np.array(problem["gradients"], "float64")
        error = np.abs(direction - problem["direction"]).max()
        assert error <= tolerance["direction"]


def test_uncompiled_tensors_on_every_backend():
    """The lines that XLA compiles, also where nothing is compiled."""
    gram = np.array(VECTORS["problems"][30]["gram"])
    tensor = keras.ops.convert_to_tensor(gram.astype("float32"))
    solution = solve_min_norm(tensor, "exclude", "drop")
    assert reference.certificate(gram, array(solution.weights)) <= 1e-6


@pytest.mark.parametrize("solve", [in_step, on_host])
@pytest.mark.parametrize(
    "case, policy",
    [
        (case, policy)
        for case in VECTORS["degenerate"]
        for policy in case["weights_by_policy"]
    ],
    ids=lambda value: value if isinstance(value, str) else value["id"],
)
def test_degenerate(case, policy, solve):
    gram = np.array(case["gram"], "float64")
    for k in case["nonfinite_groups"]:
        gram[k] = gram[:, k] = np.nan
    kind = "zero_groups" if policy in ("exclude", "literal") else "nonfinite"
    solution = solve(gram, **{kind: policy})
    expected = case["weights_by_policy"][policy]
    error = np.abs(array(solution.weights) - expected).max()
    assert error <= case["tolerance"]


QUICK = (1, 2, 3, 4, 5, 8, 13, 16, 32, 64)


@pytest.mark.parametrize(
    "groups",
    [
        k if k in QUICK else pytest.param(k, marks=pytest.mark.slow)
        for k in range(1, 65)
    ],
)
def test_every_number_of_groups(groups):
    generator = np.random.default_rng(groups)
    vectors = generator.normal(size=(groups, 40)) + 0.3
    gram = vectors @ vectors.T
    for solve in (in_step, on_host):
        weights = array(solve(gram).weights)
        assert reference.certificate(gram, weights) <= 1e-6


@st.composite
def families(draw):
    """Vectors of very different scales, angles and ranks."""
    groups = draw(st.integers(2, 6))
    dimension = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**31))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    offset = draw(st.sampled_from([0.0, 1.0, 100.0]))
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(groups, dimension)) + offset
    scales = 10.0 ** generator.uniform(-spread, spread, size=(groups, 1))
    return (vectors * scales).astype("float32").astype("float64")


@settings(max_examples=60, deadline=None)
@given(families())
def test_kkt_and_bounds(vectors):
    # Rounded first: a step sees float32 entries, whose error is not the
    # solver's.
    gram = (vectors @ vectors.T).astype("float32").astype("float64")
    norms = np.linalg.norm(vectors, axis=1)
    assume(norms.min() > 0)
    # Rounding leaves a Gram matrix of low rank indefinite by some 1e-7: there
    # is no better certificate then, in float64 either.
    for solve, limit in ((in_step, 2e-6), (on_host, 1e-6)):
        weights = array(solve(gram).weights)
        assert abs(weights.sum() - 1) <= 1e-6
        weights = weights / weights.sum()
        assert reference.certificate(gram, weights) <= limit
        norm_squared = weights @ gram @ weights
        shortest = min(gram.mean(), norms.min() ** 2)
        slack = limit * norms.min() * norms.max()
        assert norm_squared <= shortest + 10 * slack


@settings(max_examples=40, deadline=None)
@given(families(), st.randoms(use_true_random=False))
def test_invariances(vectors, random):
    gram = vectors @ vectors.T
    weights = array(on_host(gram).weights)
    order = list(range(len(gram)))
    random.shuffle(order)
    permuted = array(on_host(gram[np.ix_(order, order)]).weights)
    direction = weights @ vectors
    scale = max(np.linalg.norm(vectors, axis=1).min(), 1e-30)
    assert np.allclose(permuted @ vectors[order], direction, atol=1e-4 * scale)
    for factor in (1e-10, 1e10):
        scaled = array(on_host(gram * factor**2).weights)
        assert np.allclose(scaled @ vectors, direction, atol=1e-4 * scale)
    extra = np.vstack([vectors, vectors[:1] * 0.5 + vectors[-1:]])
    longer = array(on_host(extra @ extra.T).weights) @ extra
    assert longer @ longer <= direction @ direction + 1e-6 * scale**2


@settings(max_examples=40, deadline=None)
@given(families())
def test_agrees_with_enumeration(vectors):
    gram = vectors @ vectors.T
    exact = reference.min_norm_by_enumeration(gram)
    weights = array(on_host(gram).weights)
    assert weights @ gram @ weights <= exact @ gram @ exact + 1e-9 * np.max(
        np.diag(gram)
    )


def test_scale_of_the_loss_changes_nothing():
    gram = np.array(VECTORS["problems"][5]["gram"])
    weights = array(in_step(gram).weights)
    for factor in (1e-8, 1e8):
        assert np.abs(
            array(in_step(gram * factor).weights) - weights
        ).max() <= (1e-5)


def test_a_group_without_rows_takes_no_part():
    gram = np.array([[9.0, 0, 0], [0, 0, 0], [0, 0, 16.0]])
    present = np.array([True, False, True])
    for policy in ("exclude", "literal"):
        solution = min_norm_weights(
            gram, zero_groups=policy, nonfinite="propagate", present=present
        )
        assert np.allclose(solution.weights, [0.64, 0, 0.36])
    gram[0, 0] = np.nan
    solution = min_norm_weights(gram, nonfinite="propagate", present=present)
    assert np.allclose(solution.weights, [0.5, 0, 0.5])


@pytest.mark.parametrize(
    "gram, arguments, words",
    [
        (np.ones((2, 3)), {}, "square"),
        (np.ones(4), {}, "square"),
        (np.ones((65, 65)), {}, "1 to 64"),
        (np.ones((2, 2)), {"zero_groups": "keep"}, "zero_groups"),
        (np.ones((2, 2)), {"nonfinite": "raise"}, "nonfinite"),
    ],
)
def test_bad_input(gram, arguments, words):
    with pytest.raises(ValueError, match=words):
        min_norm_weights(gram, **arguments)


def test_measures_against_the_vectors_themselves():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(5, 30)) + 0.2
    gram = vectors @ vectors.T
    solution = on_host(gram)
    present = np.ones(5, bool)
    host = dict(
        zip(GROUP_MEASURES, gram_measures(gram, solution, present, 40.0))
    )
    direction = solution.weights @ vectors
    mean = vectors.mean(axis=0)
    norms = np.linalg.norm(vectors, axis=1)
    cosines = gram / norms[:, None] / norms[None, :]
    assert np.isclose(
        host["norm_ratio"], np.linalg.norm(direction) / np.linalg.norm(mean)
    )
    assert np.isclose(host["conflict_rate"], np.mean(vectors @ mean < 0))
    assert np.isclose(host["min_cosine"], cosines.min())
    assert host["support_size"] == np.sum(solution.weights > 1e-4)
    assert host["excluded"] == host["nonfinite"] == 0
    # Unbiased: the sample covariance of the group gradients over rows.
    trace = vectors.var(axis=0, ddof=1).sum()
    assert np.isclose(host["gradient_noise"], 8 * trace)
    assert np.isclose(host["gradient_norm_squared"], mean @ mean - trace / 5)
    tensor = keras.ops.convert_to_tensor(gram.astype("float32"))
    on_device = gram_measures(
        tensor,
        solve_min_norm(tensor, "exclude", "drop"),
        keras.ops.ones(5, "bool"),
        40.0,
    )
    assert np.allclose(
        array(on_device), list(host.values()), rtol=1e-3, atol=1e-6
    )


def test_measures_count_dropped_groups():
    gram = np.diag([1.0, np.nan, 4.0, 0.0])
    solution = on_host(gram)
    values = gram_measures(gram, solution, np.ones(4, bool), 8.0)
    figures = dict(zip(GROUP_MEASURES, values))
    assert figures["excluded"] == 2 and figures["nonfinite"] == 1
    assert all(np.isfinite(list(figures.values())))
