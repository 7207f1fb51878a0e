"""Intervals for paired scores; nothing here depends on Keras."""

from typing import NamedTuple

import numpy as np

from keras_stab.diagnostics.extras import extra

# With fewer pairs a resampled interval says next to nothing.
LEAST_PAIRS_TO_RESAMPLE = 5


class Interval(NamedTuple):
    """An estimate with the two ends of its confidence interval."""

    value: float
    low: float
    high: float

    def contains(self, number: float) -> bool:
        """Whether a number lies in the interval."""
        return self.low <= number <= self.high


def scipy_stats():
    return extra("scipy.stats", "A comparison of scores")


def paired_difference(a, b, level=0.95):
    r"""Mean of `b - a` with the interval of the paired t-test.

    $\bar d \pm t_{(1 + level) / 2, \, n - 1} \, s_d / \sqrt n$

    Args:
        a: Scores of the first arm, one per seed; at least two.
        b: Scores of the second arm, in the same order.
        level: Float, the confidence. Defaults to 0.95.

    Returns:
        `Interval`.

    >>> [round(x, 2) for x in paired_difference([1, 2, 3], [2, 4, 6])]
    [2.0, -0.48, 4.48]
    """
    differences = np.subtract(b, a, dtype="float64")
    count = len(differences)
    if count < 2:
        raise ValueError(
            f"An interval needs at least two pairs. Received: {count} pair(s)"
        )
    mean = differences.mean()
    half = (
        scipy_stats().t.ppf((1 + level) / 2, count - 1)
        * differences.std(ddof=1)
        / np.sqrt(count)
    )
    return Interval(float(mean), float(mean - half), float(mean + half))


def deviation_ratio(a, b, level=0.95):
    r"""Standard deviation of `b` over that of `a`, with Pitman's interval.

    The interval holds the ratios $\theta$ for which $\theta a + b$ and
    $\theta a - b$ are not significantly correlated (Pitman, 1939; Morgan,
    1939). With the ratio $R$ of the two, their correlation $r$ and
    $K = 1 + 2 (1 - r^2) t^2 / (n - 2)$ its ends are
    $R \sqrt{K \mp \sqrt{K^2 - 1}}$. It assumes normal scores.

    Args:
        a: Scores of the first arm, one per seed; at least three.
        b: Scores of the second arm, in the same order.
        level: Float, the confidence. Defaults to 0.95.

    Returns:
        `Interval`, or `None` if the scores of an arm are all the same.

    >>> [round(x, 2) for x in deviation_ratio([1, 2, 3, 5], [4, 8, 6, 1])]
    [1.75, 0.35, 8.82]
    """
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    count = len(a)
    if count < 3:
        raise ValueError(
            "An interval for a ratio of standard deviations needs at least "
            f"three pairs. Received: {count} pair(s)"
        )
    if _is_constant(a) or _is_constant(b):
        return None
    ratio = b.std(ddof=1) / a.std(ddof=1)
    t = scipy_stats().t.ppf((1 + level) / 2, count - 2)
    k = 1 + 2 * max(0.0, 1 - correlation(a, b) ** 2) * t**2 / (count - 2)
    # The two roots are each other's inverse: the smaller one, as a
    # difference of large numbers, would lose its digits.
    high = np.sqrt(k + np.sqrt(k**2 - 1))
    return Interval(float(ratio), float(ratio / high), float(ratio * high))


def correlation(a, b):
    """Correlation of paired scores; 0 where it is not defined."""
    if len(a) < 2 or _is_constant(a) or _is_constant(b):
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def bootstrap_difference(a, b, level=0.95, resamples=9999):
    """As `paired_difference`, from resampled pairs (BCa)."""
    return _bootstrap(_mean_difference, a, b, level, resamples)


def bootstrap_ratio(a, b, level=0.95, resamples=9999):
    """As `deviation_ratio`, from resampled pairs (BCa)."""
    if _is_constant(a) or _is_constant(b):
        return None
    logs = _bootstrap(_log_ratio, a, b, level, resamples)
    return logs and Interval(*(float(np.exp(x)) for x in logs))


def _bootstrap(statistic, a, b, level, resamples):
    """`Interval`, or `None` where resampling gives none."""
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    if len(a) < LEAST_PAIRS_TO_RESAMPLE or _is_constant(b - a):
        return None
    result = scipy_stats().bootstrap(
        (a, b),
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=resamples,
        method="BCa",
        # The same scores must give the same report.
        rng=np.random.default_rng(0),
    )
    interval = result.confidence_interval
    if not (np.isfinite(interval.low) and np.isfinite(interval.high)):
        return None
    value = float(statistic(a, b, axis=-1))
    return Interval(value, float(interval.low), float(interval.high))


def _mean_difference(a, b, axis):
    return np.mean(b - a, axis=axis)


def _log_ratio(a, b, axis):
    first, second = (np.var(x, axis=axis, ddof=1) for x in (a, b))
    # A resample of one pair alone has no ratio; 1 is the cautious answer.
    empty = (first <= 0) | (second <= 0)
    first, second = (np.where(empty, 1.0, x) for x in (first, second))
    return 0.5 * (np.log(second) - np.log(first))


def swap_test(a, b, resamples=9999):
    """p-value of equal spread, without assuming a distribution.

    If two arms are the same, the two scores of a seed could just as well be
    swapped: the ratio of standard deviations is compared with the ratios for
    all ways to swap (a sample of them for many seeds). That is exact for arms
    that are the same. For arms that differ in their means it is repeated with
    the means subtracted; the larger p-value counts.

    Returns:
        Float, two-sided. With n pairs it is never below `2 / 2**n`.
    """
    a, b = (np.asarray(x, "float64") for x in (a, b))
    return max(
        float(
            scipy_stats()
            .permutation_test(
                pair,
                _log_ratio,
                permutation_type="samples",
                vectorized=True,
                n_resamples=resamples,
                rng=np.random.default_rng(0),
            )
            .pvalue
        )
        for pair in ((a, b), (a - a.mean(), b - b.mean()))
    )


def deviation_interval(scores, level=0.95):
    """Standard deviation with its interval for normal scores."""
    count = len(scores)
    deviation = float(np.std(scores, ddof=1))
    chi2 = scipy_stats().chi2
    low, high = (
        deviation * np.sqrt((count - 1) / chi2.ppf(q, count - 1))
        for q in ((1 + level) / 2, (1 - level) / 2)
    )
    return Interval(deviation, float(low), float(high))


def rate_interval(count, total, level=0.95):
    """Share of failed runs with its exact interval (Clopper, Pearson)."""
    interval = (
        scipy_stats().binomtest(int(count), int(total)).proportion_ci(level)
    )
    return Interval(count / total, float(interval.low), float(interval.high))


def sign_test(a, b):
    """p-value of McNemar's exact test: does one of two arms fail more often?

    Args:
        a: Booleans, the failed runs of the first arm, one per seed.
        b: Those of the second.
    """
    only_a = int(np.sum(a & ~b))
    only_b = int(np.sum(b & ~a))
    if only_a + only_b == 0:
        return 1.0
    return float(scipy_stats().binomtest(only_a, only_a + only_b).pvalue)


def _is_constant(scores):
    scores = np.asarray(scores, "float64")
    # Differences of equal steps differ in their last bits.
    return np.ptp(scores) <= 1e-12 * np.max(np.abs(scores), initial=0.0)
