"""`compare_scores`: what it answers, and in which words."""

import sys

import numpy as np
import pytest

import keras_stab

CLEAR = ([80.0, 81.0, 82.0, 83.0, 84.0], [83.0, 84.2, 84.9, 86.1, 87.0])
UNCLEAR = ([80.0, 81.0, 82.0, 83.0, 84.0], [81.0, 80.0, 83.0, 82.0, 84.5])


def compare(a, b, **options):
    options = {"names": ("AdamW", "GRAIN"), **options}
    return keras_stab.compare_scores(a, b, **options)


def test_a_clear_difference_has_size_and_direction():
    result = compare(*CLEAR, questions=("mean",), unit="points")
    assert result.answers == {"mean": "better"}
    assert result.level == 0.95
    assert result.verdict == (
        "GRAIN is better by 3.040 points (95 % interval 2.898 to 3.182)."
    )
    lower = compare(*CLEAR, questions=("mean",), higher_is_better=False)
    assert lower.verdict.startswith("GRAIN is worse by 3.040 (95 %")
    other = compare(*CLEAR[::-1], questions=("mean",))
    assert other.verdict == (
        "GRAIN is worse by 3.040 (95 % interval 2.898 to 3.182)."
    )


def test_an_interval_that_contains_0_gives_no_winner():
    result = compare(*UNCLEAR, relevant_difference=0.5)
    assert result.answers == {"mean": "cannot tell", "spread": "cannot tell"}
    assert "better" not in result.verdict and "worse" not in result.verdict
    assert "which contains 0" in result.verdict
    needed = keras_stab.seeds_needed(
        0.5, np.std(np.subtract(*UNCLEAR), ddof=1), level=result.level
    )
    assert result.seeds_needed == needed
    assert f"to find 0.5 takes {needed} seeds" in result.verdict


def test_identical_arms_cannot_be_told_apart():
    result = compare(CLEAR[0], CLEAR[0])
    assert result.difference == (0.0, 0.0, 0.0)
    assert set(result.answers.values()) == {"cannot tell"}


def test_no_relevant_difference():
    result = compare(*CLEAR, questions=("mean",), relevant_difference=5.0)
    assert result.answers["mean"] == "no relevant difference"
    assert "within 5 either way" in result.verdict


def test_intervals_grow_with_the_number_of_questions():
    one = compare(*CLEAR, questions=("mean",))
    two = compare(*CLEAR)
    six = compare(*CLEAR, comparisons=3)
    assert (one.level, two.level) == (0.95, 0.975)
    assert six.level == pytest.approx(1 - 0.05 / 6)
    widths = [c.difference.high - c.difference.low for c in (one, two, six)]
    assert widths == sorted(widths) and widths[0] < widths[2]
    assert "97.5 % interval" in two.verdict


def test_a_steadier_arm_needs_seven_pairs():
    random = np.random.default_rng(3)
    a, b = random.normal(size=12), 0.05 * random.normal(size=12)
    assert compare(a, b).answers["spread"] == "steadier"
    assert compare(b, a).answers["spread"] == "less steady"
    few = compare(a[:6], b[:6])
    assert not few.ratio.contains(1.0)
    assert few.answers["spread"] == "cannot tell"
    assert "6 pairs allow 0.031 at best" in few.verdict


def test_the_paired_test_and_the_resampled_pairs_must_agree():
    differences = np.array([-0.3, -0.2, 0.1, -0.2, -0.1, -0.2])
    result = compare(
        np.arange(6.0), np.arange(6.0) + differences, questions=("mean",)
    )
    assert not result.difference.contains(0.0)
    assert result.difference_resampled.contains(0.0)
    assert result.answers["mean"] == "cannot tell"
    assert "the one from resampled pairs does not" in result.verdict


def test_failed_runs_are_left_out_and_told():
    a = [80.0, np.nan, 81.0, 82.5, np.inf, 83.0]
    b = [83.0, 84.0, 84.1, 85.6, 80.0, 86.0]
    result = compare(a, b)
    assert (result.pairs, result.runs, result.failed) == (4, 6, (2, 0))
    assert result.difference.value == pytest.approx(3.05)
    assert result.answers["failures"] == "cannot tell"
    assert result.level == pytest.approx(1 - 0.05 / 3)
    assert "2 of 6 with AdamW" in result.verdict
    assert "leaves out 2 pairs" in result.verdict
    broken = compare([np.nan] * 10, [1.0] * 10)
    assert broken.answers == {
        "failures": "fewer",
        "mean": "cannot tell",
        "spread": "cannot tell",
    }
    assert "0 of 10 pairs of runs have two scores" in broken.verdict


def test_scores_without_spread_are_suspicious():
    result = compare([80.0] * 5, [81.0] * 5)
    assert result.answers["mean"] == "cannot tell"
    assert "Do the runs use their seeds?" in result.verdict
    # A constant shift of scores that do vary is a finding.
    shifted = compare(CLEAR[0], np.add(CLEAR[0], 1.0), questions=("mean",))
    assert shifted.answers["mean"] == "better"


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        ([1.0], [2.0], {}, "at least two seeds"),
        ([1.0, 2.0], [2.0], {}, "same length"),
        (["a", "b"], [1.0, 2.0], {}, "`a` must be a list of numbers"),
        ([[1.0, 2.0]], [[2.0, 3.0]], {}, "same length"),
        ([1.0, 2.0], [2.0, 3.0], {"level": 95}, "`level` must be in"),
        ([1.0, 2.0], [2.0, 3.0], {"questions": "mean"}, "tuple"),
        ([1.0, 2.0], [2.0, 3.0], {"questions": ()}, "tuple"),
        ([1.0, 2.0], [2.0, 3.0], {"questions": ("means",)}, "tuple"),
        ([1.0, 2.0], [2.0, 3.0], {"relevant_difference": 0}, "above 0"),
        ([1.0, 2.0], [2.0, 3.0], {"comparisons": 0}, "at least 1"),
        ([1.0, 2.0], [2.0, 3.0], {"comparisons": 1.5}, "an integer"),
        ([1.0, 2.0], [2.0, 3.0], {"resamples": 0}, "at least 1"),
        ([1.0, 2.0], [2.0, 3.0], {"higher_is_better": "no"}, "a boolean"),
        ([1.0, 2.0], [2.0, 3.0], {"names": ("A",)}, "the two names"),
        ([1.0, 2.0], [2.0, 3.0], {"failed": [[True]]}, "2 booleans"),
    ],
)
def test_bad_arguments(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        keras_stab.compare_scores(a, b, **options)


def test_without_scipy_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install \"keras-stab\[report"):
        keras_stab.compare_scores(*CLEAR)
