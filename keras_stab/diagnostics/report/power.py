"""How many seeds it takes; nothing here depends on Keras."""

import math

import numpy as np

from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.diagnostics.report.statistics import scipy_stats

MOST_SEEDS = 1_000_000


def seeds_needed(
    difference: float,
    deviation: float,
    power: float = 0.8,
    level: float = 0.95,
) -> int:
    r"""Seeds that it takes to detect a difference between two paired arms.

    The smallest n for which the paired t-test at this level finds a true mean
    difference with probability `power` (noncentral t distribution).

    Args:
        difference: Float, the mean difference to detect; not 0.
        deviation: Float, standard deviation of the differences seed by seed
            (that of `b - a`, not of `a` or `b`).
        power: Float between 0 and 1. Defaults to 0.8.
        level: Float, the confidence. Defaults to 0.95.

    Returns:
        Int, at least 2.

    Raises:
        ValueError: If an argument is out of range, or it takes more than a
            million seeds.
        ImportError: If scipy is not installed.

    Example:

    >>> import keras_stab
    >>> keras_stab.seeds_needed(difference=0.5, deviation=1.0)
    34
    """
    difference = checked_number("difference", difference)
    if difference == 0.0:
        raise ValueError("`difference` must not be 0. Received: difference=0.0")
    deviation = checked_number("deviation", deviation, 0.0)
    power = checked_fraction("power", power, one=False)
    level = checked_fraction("level", level, one=False)
    if deviation == 0:
        return 2
    effect = abs(difference) / deviation
    low, high = 1, 2
    while paired_power(effect, high, level) < power:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            raise ValueError(
                f"A difference of {difference:g} with a deviation of "
                f"{deviation:g} takes more than {MOST_SEEDS} seeds."
            )
    while high - low > 1:
        middle = (low + high) // 2
        if paired_power(effect, middle, level) < power:
            low = middle
        else:
            high = middle
    return high


def paired_power(effect, count, level=0.95):
    """Probability that the paired t-test finds a difference.

    Args:
        effect: Float, the true difference in units of the standard deviation
            of the differences.
        count: Int, pairs; at least two.
        level: Float, the confidence. Defaults to 0.95.
    """
    stats = scipy_stats()
    limit = stats.t.ppf((1 + level) / 2, count - 1)
    center = abs(effect) * math.sqrt(count)
    if center > limit + 30:
        # The noncentral distribution underflows here.
        return 1.0
    above = stats.nct.sf(limit, count - 1, center)
    below = stats.nct.cdf(-limit, count - 1, center)
    return float(above + np.nan_to_num(below))


def detectable_difference(deviation, count, power=0.8, level=0.95):
    """The difference that `count` pairs find with probability `power`."""
    low, high = 0.0, 1.0
    while paired_power(high, count, level) < power:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if paired_power(middle, count, level) < power:
            low = middle
        else:
            high = middle
    return high * deviation


def seeds_needed_for_ratio(ratio, correlation=0.0, power=0.8, level=0.95):
    """Seeds that it takes to see that standard deviations differ.

    By Fisher's approximation for the correlation that Pitman's test looks at.

    Args:
        ratio: Float, the ratio of the standard deviations; not 1.
        correlation: Float, of the two arms' scores. Defaults to 0.
        power: Float between 0 and 1. Defaults to 0.8.
        level: Float, the confidence. Defaults to 0.95.
    """
    if not ratio > 0 or ratio == 1:
        raise ValueError(
            "`ratio` must be a positive number other than 1. Received: "
            f"ratio={ratio}"
        )
    square = ratio**2
    rho = abs(square - 1) / math.sqrt(
        (square + 1) ** 2 - 4 * correlation**2 * square
    )
    normal = scipy_stats().norm
    quantiles = normal.ppf((1 + level) / 2) + normal.ppf(power)
    # Arms that are all but proportional: any three pairs show it.
    rho = min(rho, 1 - 1e-12)
    return math.ceil((quantiles / math.atanh(rho)) ** 2 + 3)
