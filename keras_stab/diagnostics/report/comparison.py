"""Two arms on the same seeds: figures, and a verdict in plain words."""

import dataclasses

import numpy as np

from keras_stab.diagnostics.report import power
from keras_stab.diagnostics.report import statistics
from keras_stab.diagnostics.report import words
from keras_stab.diagnostics.report.statistics import Interval

QUESTIONS = ("mean", "spread")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What paired scores say about two arms.

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
            takes no distribution for granted.
        failed: The numbers of failed runs of the two arms.
        runs: Int, runs of each arm.
        level: Float, the confidence of each of these intervals.
        detectable: Float, the mean difference that so many pairs find with
            probability 0.8.
        seeds_needed: Int, seeds to find `relevant_difference` with
            probability 0.8; `None` without one.
        answers: Dict from question (`"mean"`, `"spread"`, `"failures"`) to
            answer: `"better"`, `"worse"`, `"no relevant difference"`;
            `"steadier"`, `"less steady"`; `"fewer"`, `"more"`; or
            `"cannot tell"`.
        verdict: String, the answers in words.

    What is `None` was not asked for or could not be computed, mostly for want
    of pairs.
    """

    baseline: str
    arm: str
    pairs: int
    runs: int
    means: tuple
    deviations: tuple
    correlation: float
    deviation_of_differences: float | None
    difference: Interval | None
    difference_resampled: Interval | None
    ratio: Interval | None
    ratio_resampled: Interval | None
    swap_p_value: float | None
    failed: tuple
    level: float
    detectable: float | None
    seeds_needed: int | None
    answers: dict = dataclasses.field(default_factory=dict)
    verdict: str = ""

    def seeds_table(self, sizes):
        """How many seeds find which mean difference.

        Args:
            sizes: Differences in units of the standard deviation of the
                differences seed by seed.

        Returns:
            List of pairs of a difference and a number of seeds (power 0.8).
        """
        return [
            (
                size * self.deviation_of_differences,
                power.seeds_needed(size, 1.0, level=self.level),
            )
            for size in sizes
        ]


def compare_scores(
    a,
    b,
    names=("A", "B"),
    level=0.95,
    questions=QUESTIONS,
    comparisons=1,
    higher_is_better=True,
    relevant_difference=None,
    unit="",
    failed=None,
    resamples=9999,
):
    r"""Compares two lists of scores that belong together seed by seed.

    One arm is called better if both the interval of the paired t-test and the
    one from resampled pairs (BCa; five pairs or more) leave 0 outside. It is
    called steadier if Pitman's interval for the ratio of standard deviations
    leaves 1 outside and a test by swapping the scores of a pair agrees, which
    takes seven pairs at least: the former takes normal scores for granted.
    Everything else is "cannot tell". The intervals of all questions together
    hold with the confidence `level` (Bonferroni), so each is wider than one
    that stands alone.

    Args:
        a: Scores of the first arm (the baseline), one per seed. NaN or an
            infinite number marks a failed run; its pair is left out.
        b: Scores of the second arm, in the same order.
        names: The two names. Defaults to `("A", "B")`.
        level: Float, the confidence with which everything holds together.
            Defaults to 0.95.
        questions: What to ask, any of `"mean"` and `"spread"`. To ask less
            makes the intervals narrower; decide before you see the scores.
            Defaults to both.
        comparisons: Int, how many comparisons like this one belong together.
            Defaults to 1.
        higher_is_better: Boolean. Defaults to `True`.
        relevant_difference: Float, the smallest mean difference that matters.
            With it the verdict can be that there is none, and says how many
            seeds it takes. Defaults to `None`.
        unit: String behind differences, such as `"points"`. Defaults to `""`.
        failed: Two lists of booleans, runs that count as failed although they
            have a score. Defaults to `None`.
        resamples: Int, resampled or swapped sets of pairs. Defaults to 9999.

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
    a, b = (np.asarray(scores, dtype="float64") for scores in (a, b))
    check_options(level, questions, relevant_difference)
    _check_pairs(a, b)
    if comparisons < 1:
        raise ValueError(
            f"`comparisons` must be at least 1. Received: {comparisons}"
        )
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
        failed=tuple(int(np.sum(x)) for x in failures),
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


def check_options(level, questions, relevant_difference):
    """Raises a `ValueError` for what is out of range."""
    if not 0 < level < 1:
        raise ValueError(
            f"`level` must lie between 0 and 1. Received: level={level}"
        )
    unknown = set(questions) - set(QUESTIONS)
    if isinstance(questions, str) or unknown or not questions:
        raise ValueError(
            f"`questions` must be a tuple of some of {QUESTIONS}. Received: "
            f"questions={questions!r}"
        )
    if relevant_difference is not None and not relevant_difference > 0:
        raise ValueError(
            "`relevant_difference` must be a positive number. Received: "
            f"relevant_difference={relevant_difference}"
        )


def _check_pairs(a, b):
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            "Two lists of scores of the same length are needed, paired seed "
            f"by seed. Received: shapes {a.shape} and {b.shape}"
        )
    if len(a) < 2:
        raise ValueError(
            "A comparison needs at least two seeds; five or more are advised. "
            f"Received: {len(a)}"
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
