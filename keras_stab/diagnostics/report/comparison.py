"""Two arms on the same seeds: figures, and a verdict in plain words."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.diagnostics.report import power
from keras_stab.diagnostics.report import statistics
from keras_stab.diagnostics.report import words
from keras_stab.diagnostics.report.checks import QUESTIONS
from keras_stab.diagnostics.report.checks import as_scores
from keras_stab.diagnostics.report.checks import check_pairs
from keras_stab.diagnostics.report.checks import check_twos
from keras_stab.diagnostics.report.checks import checked_options
from keras_stab.diagnostics.report.statistics import Interval


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What paired scores show about two arms.

    Attributes:
        baseline: String, name of the first arm.
        arm: String, name of the second.
        pairs: Int, seeds with a score of both.
        means: The two mean scores over these pairs.
        deviations: The two standard deviations.
        correlation: Float, of the two arms' scores.
        deviation_of_differences: Float, standard deviation of second minus
            first, seed by seed.
        difference: `Interval` of the mean of second minus first (paired t).
        difference_resampled: The same from resampled pairs (BCa).
        ratio: `Interval` of the ratio of standard deviations, second over
            first (Pitman, Morgan).
        ratio_resampled: The same from resampled pairs.
        swap_p_value: Float, p-value of equal spread from swapped pairs, which
            assumes no distribution.
        failed: The numbers of failed runs of the two arms.
        runs: Int, runs of each arm.
        level: Float, the confidence of each of these intervals.
        detectable: Float, the mean difference that this number of pairs
            finds with probability 0.8.
        seeds_needed: Int, seeds to find `relevant_difference` with
            probability 0.8; `None` without one.
        answers: Dict from question (`"mean"`, `"spread"`, `"failures"`) to
            answer: `"better"`, `"worse"`, `"no relevant difference"`;
            `"steadier"`, `"less steady"`; `"fewer"`, `"more"`; or
            `"cannot tell"`.
        verdict: String, the answers in words.

    A figure is `None` if it was not asked for or could not be computed,
    mostly because there are too few pairs.
    """

    baseline: str
    arm: str
    pairs: int
    runs: int
    means: tuple[float | None, float | None]
    deviations: tuple[float | None, float | None]
    correlation: float
    deviation_of_differences: float | None
    difference: Interval | None
    difference_resampled: Interval | None
    ratio: Interval | None
    ratio_resampled: Interval | None
    swap_p_value: float | None
    failed: tuple[int, int]
    level: float
    detectable: float | None
    seeds_needed: int | None
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    verdict: str = ""

    def seeds_table(self, sizes: Sequence[float]) -> list[tuple[float, int]]:
        """How many seeds find which mean difference.

        Args:
            sizes: Differences in units of the standard deviation of the
                differences seed by seed.

        Returns:
            List of pairs of a difference and a number of seeds (power 0.8).
        """
        deviation = self.deviation_of_differences
        if deviation is None:
            raise ValueError("Too few pairs of runs to know their spread")
        return [
            (
                size * deviation,
                power.seeds_needed(size, 1.0, level=self.level),
            )
            for size in sizes
        ]


def compare_scores(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    names: Sequence[str] = ("A", "B"),
    level: float = 0.95,
    questions: Sequence[str] = QUESTIONS,
    comparisons: int = 1,
    higher_is_better: bool = True,
    relevant_difference: float | None = None,
    unit: str = "",
    failed: Sequence[Sequence[bool]] | None = None,
    resamples: int = 9999,
) -> Comparison:
    r"""Compares two lists of scores that are paired seed by seed.

    One arm is called better if both the interval of the paired t-test and the
    one from resampled pairs (BCa; five pairs or more) exclude 0. It is called
    steadier if Pitman's interval for the ratio of standard deviations, which
    assumes normal scores, excludes 1, and a test that swaps the scores within
    pairs, which assumes nothing and takes at least seven pairs, agrees.
    Everything else is "cannot tell". The intervals of all questions hold
    together with the confidence `level` (Bonferroni), so each is wider than it
    would be alone.

    Args:
        a: Scores of the first arm (the baseline), one per seed. NaN or an
            infinite number marks a failed run; its pair is left out.
        b: Scores of the second arm, in the same order.
        names: The two names. Defaults to `("A", "B")`.
        level: Float, the confidence with which everything holds together.
            Defaults to 0.95.
        questions: What to ask: a list or tuple of `"mean"`, `"spread"` or
            both. Asking only one makes the intervals narrower; decide before
            you see the scores. Defaults to both.
        comparisons: Int, how many comparisons like this one the confidence
            `level` covers. Defaults to 1.
        higher_is_better: Boolean. Defaults to `True`.
        relevant_difference: Float, the smallest mean difference that matters.
            With it the verdict can be that there is none, and says how many
            seeds it takes to find one. Defaults to `None`.
        unit: String behind differences, such as `"points"`. Defaults to `""`.
        failed: Two lists of booleans, runs that count as failed although they
            have a score. Defaults to `None`.
        resamples: Int, number of resampled or swapped sets of pairs. Defaults
            to 9999.

    Returns:
        `Comparison`; print its `verdict`.

    Raises:
        ValueError: If the lists differ in length, hold fewer than two pairs,
            or an argument is out of range.
        ImportError: If scipy is not installed.

    Example:

    >>> import keras_stab
    >>> plain = [81.2, 83.0, 79.9, 82.4, 80.3, 81.9]
    >>> method = [83.1, 84.6, 82.5, 84.0, 82.6, 83.2]
    >>> result = keras_stab.compare_scores(plain, method, ("plain", "SAM"))
    >>> print(result.answers)
    {'mean': 'better', 'spread': 'cannot tell'}
    >>> print(result.verdict)
    SAM is better by 1.883 (97.5 % interval 1.254 to 2.513). We cannot tell...

    References:
        - Pitman, 1939, "A note on normal correlation", Biometrika 31
        - Efron, 1987, "Better bootstrap confidence intervals", J. Am. Stat.
          Assoc. 82
    """
    a, b = as_scores("a", a), as_scores("b", b)
    level, questions, relevant_difference = checked_options(
        level, questions, relevant_difference
    )
    check_pairs(a, b)
    checked_count("comparisons", comparisons, 1)
    checked_count("resamples", resamples, 1)
    checked_boolean("higher_is_better", higher_is_better)
    check_twos(names, failed, len(a))
    failures = [~np.isfinite(scores) for scores in (a, b)]
    usable = ~(failures[0] | failures[1])
    if failed is not None:
        failures = [x | np.asarray(y, bool) for x, y in zip(failures, failed)]
    asked = len(questions) + bool(np.any(failures))
    level = 1 - (1 - level) / (max(1, asked) * comparisons)
    comparison = Comparison(
        baseline=names[0],
        arm=names[1],
        runs=len(a),
        failed=(int(np.sum(failures[0])), int(np.sum(failures[1]))),
        level=level,
        **_figures(
            a[usable],
            b[usable],
            level,
            questions,
            relevant_difference,
            resamples,
        ),
    )
    answers, sentences = words.judge(
        comparison,
        questions,
        sign=1 if higher_is_better else -1,
        relevant=relevant_difference,
        unit=unit,
        failures_differ=statistics.sign_test(*failures) < 1 - level,
    )
    return dataclasses.replace(
        comparison, answers=answers, verdict=" ".join(sentences)
    )


def _figures(a, b, level, questions, relevant_difference, resamples):
    """The numbers of a `Comparison`, from complete pairs."""
    pairs = len(a)
    figures = {
        "pairs": pairs,
        "means": tuple(float(x.mean()) if pairs else None for x in (a, b)),
        "deviations": tuple(
            float(x.std(ddof=1)) if pairs > 1 else None for x in (a, b)
        ),
        "correlation": statistics.correlation(a, b),
        "deviation_of_differences": None,
        "difference": None,
        "difference_resampled": None,
        "ratio": None,
        "ratio_resampled": None,
        "swap_p_value": None,
        "detectable": None,
        "seeds_needed": None,
    }
    if pairs < 2:
        return figures
    if "mean" in questions:
        deviation = float((b - a).std(ddof=1))
        figures |= {
            "deviation_of_differences": deviation,
            "difference": statistics.paired_difference(a, b, level),
            "difference_resampled": statistics.bootstrap_difference(
                a, b, level, resamples
            ),
            "detectable": power.detectable_difference(
                deviation, pairs, level=level
            ),
        }
        if relevant_difference is not None:
            figures["seeds_needed"] = power.seeds_needed(
                relevant_difference, deviation, level=level
            )
    if "spread" in questions and pairs > 2:
        figures |= {
            "ratio": statistics.deviation_ratio(a, b, level),
            "ratio_resampled": statistics.bootstrap_ratio(
                a, b, level, resamples
            ),
            "swap_p_value": statistics.swap_test(a, b, resamples),
        }
    return figures
