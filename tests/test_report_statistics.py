"""Figures of the stability report against closed forms, scipy, simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import keras_stab
from keras_stab.diagnostics.report import agreement
from keras_stab.diagnostics.report import power
from keras_stab.diagnostics.report import statistics
from keras_stab.diagnostics.report.comparison import compare_scores


def draw(count, seed=0, shift=0.0, scale=1.0, common=1.0):
    """Paired scores that share a part, seed by seed."""
    random = np.random.default_rng(seed)
    both = common * random.normal(size=count)
    a = 80 + both + random.normal(size=count)
    b = 80 + shift + scale * (both + random.normal(size=count))
    return a, b


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_difference_is_that_of_the_paired_t_test(count, level):
    a, b = draw(count, seed=count, shift=1.0)
    expected = stats.ttest_rel(b, a).confidence_interval(level)
    interval = statistics.paired_difference(a, b, level)
    np.testing.assert_allclose(interval.value, np.mean(b) - np.mean(a))
    np.testing.assert_allclose((interval.low, interval.high), expected)


def test_difference_needs_two_pairs():
    with pytest.raises(ValueError, match="at least two pairs. Received: 1"):
        statistics.paired_difference([90.0], [91.0])


@pytest.mark.parametrize("count", [3, 4, 12])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_ratio_interval_ends_where_pitmans_correlation_is_significant(
    count, level
):
    a, b = draw(count, seed=count, scale=1.7)
    interval = statistics.deviation_ratio(a, b, level)
    assert interval.value == pytest.approx(b.std() / a.std())
    for end in (interval.low, interval.high):
        test = stats.pearsonr(end * a + b, end * a - b)
        assert test.pvalue == pytest.approx(1 - level, rel=1e-6)


def test_ratio_of_constant_or_too_few_scores():
    assert statistics.deviation_ratio([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="three pairs. Received: 2"):
        statistics.deviation_ratio([1, 2], [1, 3])
    # All but proportional scores: no width, and no NaN.
    exact = statistics.deviation_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    np.testing.assert_allclose(exact, (2.0, 2.0, 2.0), rtol=1e-6)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=8),
    st.floats(0.1, 10.0),
    st.floats(-100, 100),
)
def test_intervals_move_with_the_scores(a, scale, shift):
    a = np.array(a) + np.linspace(0, 5, len(a))
    b = np.sin(a) * 3 + np.arange(len(a))
    moved = statistics.paired_difference(scale * a, scale * b + shift)
    expected = statistics.paired_difference(a, b)
    np.testing.assert_allclose(
        moved, np.multiply(scale, expected) + shift, rtol=1e-6, atol=1e-6
    )
    ratio = statistics.deviation_ratio(a, b)
    swapped = statistics.deviation_ratio(b, a)
    if ratio is not None:
        # a over b is one over b over a, and so are the ends.
        expected = (1 / swapped.value, 1 / swapped.high, 1 / swapped.low)
        np.testing.assert_allclose(ratio, expected, rtol=1e-6)


def test_bootstrap_agrees_with_the_closed_forms_for_many_normal_pairs():
    a, b = draw(200, seed=5, shift=0.5, scale=1.4)
    for closed, resampled in (
        (statistics.paired_difference, statistics.bootstrap_difference),
        (statistics.deviation_ratio, statistics.bootstrap_ratio),
    ):
        np.testing.assert_allclose(
            resampled(a, b), closed(a, b), rtol=0.12, atol=0.02
        )
        assert resampled(a, b) == resampled(a, b)
        assert resampled(a[:4], b[:4]) is None
    assert statistics.bootstrap_difference(a, a + 1.0) is None
    assert statistics.bootstrap_ratio(a, np.ones(200)) is None


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_swap_test_counts_all_ways_to_swap(shift):
    a, b = draw(7, seed=11, scale=6.0, common=0.0, shift=shift)

    def p_value(a, b):
        ratios = []
        for swaps in itertools.product((False, True), repeat=len(a)):
            x, y = np.where(swaps, b, a), np.where(swaps, a, b)
            ratios.append(math.log(y.std() / x.std()))
        observed = ratios[0]
        tail = min(
            np.mean([r >= observed - 1e-12 for r in ratios]),
            np.mean([r <= observed + 1e-12 for r in ratios]),
        )
        return min(1.0, 2 * tail)

    expected = max(p_value(a, b), p_value(a - a.mean(), b - b.mean()))
    assert statistics.swap_test(a, b) == pytest.approx(expected)


def test_intervals_of_one_arm():
    scores, _ = draw(9)
    interval = statistics.deviation_interval(scores, 0.9)
    # The ends are where the chi-square test of the variance turns.
    for end, tail in ((interval.low, 0.95), (interval.high, 0.05)):
        statistic = 8 * scores.var(ddof=1) / end**2
        assert stats.chi2.cdf(statistic, 8) == pytest.approx(tail)
    rate = statistics.rate_interval(2, 10)
    # The exact interval by its definition.
    assert stats.binom.sf(1, 10, rate.low) == pytest.approx(0.025)
    assert stats.binom.cdf(2, 10, rate.high) == pytest.approx(0.025)


def test_sign_test_is_mcnemars():
    a = np.array([True] * 6 + [False] * 4)
    b = np.array([False] * 6 + [False] * 3 + [True])
    assert statistics.sign_test(a, b) == pytest.approx(16 / 128)
    assert statistics.sign_test(a, a) == 1.0


# The textbook figures for a paired t-test, two-sided 5 %, power 80 %.
@pytest.mark.parametrize(
    "effect, count", [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (1.5, 6)]
)
def test_seeds_needed_are_the_textbook_figures(effect, count):
    assert keras_stab.seeds_needed(effect, 1.0) == count
    assert keras_stab.seeds_needed(-3 * effect, 3.0) == count
    assert power.paired_power(effect, count) >= 0.8
    assert power.paired_power(effect, count - 1) < 0.8
    found = power.detectable_difference(2.0, count)
    assert power.paired_power(found / 2.0, count) == pytest.approx(0.8)


def test_power_is_that_of_simulated_tests():
    random = np.random.default_rng(0)
    samples = random.normal(0.9, 1.0, size=(20000, 8))
    seen = np.mean(stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05)
    assert power.paired_power(0.9, 8) == pytest.approx(seen, abs=0.01)


def test_power_at_the_ends():
    assert power.paired_power(0.0, 5) == pytest.approx(0.05)
    assert power.paired_power(1e6, 2) == 1.0
    assert keras_stab.seeds_needed(1.0, 0.0) == 2
    assert keras_stab.seeds_needed(1e9, 1.0) == 2
    for arguments, message in (
        ({"difference": 0.0, "deviation": 1.0}, "must not be 0"),
        ({"difference": 1.0, "deviation": -1.0}, "at least 0"),
        ({"difference": 1.0, "deviation": math.nan}, "at least 0"),
        ({"difference": 1.0, "deviation": 1.0, "power": 1.0}, r"in \(0, 1\)"),
        ({"difference": 1e-6, "deviation": 1.0}, "more than 1000000 seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_stab.seeds_needed(**arguments)


@pytest.mark.parametrize("ratio, correlation", [(0.5, 0.0), (2.0, 0.6)])
def test_seeds_for_a_ratio_have_the_power_that_they_promise(ratio, correlation):
    count = power.seeds_needed_for_ratio(ratio, correlation)
    random = np.random.default_rng(1)
    a, noise = random.normal(size=(2, 4000, count))
    b = ratio * (correlation * a + math.sqrt(1 - correlation**2) * noise)
    seen = stats.pearsonr(a + b, a - b, axis=1).pvalue < 0.05
    assert np.mean(seen) == pytest.approx(0.8, abs=0.06)
    with pytest.raises(ValueError, match="other than 1"):
        power.seeds_needed_for_ratio(1.0)


def test_agreement_is_the_mean_over_all_pairs_of_runs():
    predictions = np.random.default_rng(0).integers(0, 3, (5, 40))
    expected = [
        np.mean(one == other)
        for one, other in itertools.combinations(predictions, 2)
    ]
    found = agreement.prediction_agreement(predictions)
    assert found == pytest.approx(np.mean(expected))
    with pytest.raises(ValueError, match="at least two runs"):
        agreement.prediction_agreement([[1, 2, 3]])


def test_floors_are_the_deviations_of_simulated_accuracies():
    random = np.random.default_rng(0)
    # New test rows for one model.
    right = random.random((4000, 300)) < 0.7
    assert agreement.binomial_floor(0.7, 300) == pytest.approx(
        right.mean(axis=1).std(), rel=0.05
    )
    # The same rows, some hard and some easy, for many independent runs.
    right = random.random((4000, 300)) < random.random(300)
    observed = right.mean(axis=1).std()
    assert agreement.flip_floor(right) == pytest.approx(observed, rel=0.05)
    # Unbiased from few runs, too.
    few = [agreement.flip_floor(right[i : i + 3]) for i in range(0, 300, 3)]
    assert np.mean(few) == pytest.approx(observed, rel=0.05)


def test_no_verdict_in_favour_of_arms_that_are_the_same():
    """At most 5 % of reports on identical arms claim anything."""
    claims = 0
    for seed in range(200):
        a, b = draw(8, seed=seed)
        answers = compare_scores(a, b, resamples=299).answers
        claims += set(answers.values()) != {"cannot tell"}
    assert claims <= 10


def test_a_known_difference_is_found_as_often_as_promised():
    found, deviation, count = 0, math.sqrt(2.0), 10
    for seed in range(100):
        a, b = draw(count, seed=seed, shift=2.0)
        result = compare_scores(a, b, questions=("mean",), resamples=299)
        found += result.answers["mean"] == "better"
        assert result.answers["mean"] != "worse"
    promised = power.paired_power(2.0 / deviation, count)
    assert promised > 0.95
    assert found / 100 == pytest.approx(promised, abs=0.05)


def test_a_known_ratio_is_found():
    found = 0
    for seed in range(60):
        a, b = draw(20, seed=seed, scale=0.35, common=0.0)
        answer = compare_scores(a, b, resamples=299).answers["spread"]
        found += answer == "steadier"
        assert answer != "less steady"
    assert found > 50
