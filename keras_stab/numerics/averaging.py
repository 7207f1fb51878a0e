"""Coefficients of running averages, in one form for every rule.

With n values averaged before this one, the average moves by

    a <- a + coefficient(n) (w - a),    a <- w for n = 0

"""

import operator

import keras
import numpy as np


def uniform(count):
    """The mean of all values."""
    return 1.0 / (count + 1.0)


def exponential(count, decay, warmup_gamma=None, warmup_power=2.0 / 3.0):
    """Weights that fall by the factor `decay` with age.

    With `warmup_gamma`, the decay of average n is at most
    `1 - (1 + n / warmup_gamma) ** -warmup_power`: early averages are short.
    """
    # In Python: 1 - decay in float32 is off by 3e-4 of itself at 0.9999.
    floor = 1.0 - decay
    if warmup_gamma is None:
        return 0.0 * count + floor
    warm = keras.ops.power(1.0 + count / warmup_gamma, -warmup_power)
    # Not `maximum`: on PyTorch that rounds float64 scalars to float32.
    return keras.ops.clip(warm, floor, 1.0)


def dynamic_exponential(count, decay):
    """As `exponential`, with a decay of at most (1 + n) / (10 + n)."""
    return keras.ops.clip(9.0 / (10.0 + count), 1.0 - decay, 1.0)


def polynomial(count, exponent):
    """0 is the mean of all values; a larger exponent favours late ones."""
    return (exponent + 1.0) / (count + exponent + 1.0)


def power(count, exponent):
    """Value t weighs about t ** exponent; the width grows with time."""
    # 1 - (1 - 1/t)^(g+1) loses its digits in float32.
    ratio = keras.ops.log1p(-1.0 / (count + 1.0))
    return -keras.ops.expm1((exponent + 1.0) * ratio)


def power_exponent(relative_std):
    """The exponent of a power profile of that width, relative to its length.

    The largest real root of `g^3 + 7 g^2 + (16 - s) g + 12 - s`, where
    `s = relative_std ** -2`.
    """
    s = relative_std**-2.0
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return float(np.max(roots.real[np.abs(roots.imag) < 1e-8]))


class Numbers:
    """What `schedule_free` asks of `keras.ops`, without tensors."""

    power = operator.pow

    @staticmethod
    def where(condition, first, second):
        return first if condition else second


def schedule_free(step, rate, before, powers, ops=keras.ops):
    """The share of the new iterate in the average of Schedule-Free.

    Args:
        step: Number of the update, from 1.
        rate: Its learning rate.
        before: Pair: the largest rate and the sum of weights so far.
        powers: Pair of floats: of the step and of the largest rate.
        ops: `keras.ops` for tensors, `Numbers` for NumPy's numbers.

    Returns:
        The new pair, and the share: 0 while all rates were 0.
    """
    largest, total = before
    # Not `maximum`: on PyTorch that rounds float64 scalars to float32.
    largest = ops.where(rate > largest, rate, largest)
    weight = ops.power(step, powers[0]) * ops.power(largest, powers[1])
    total = total + weight
    share = ops.where(total > 0, weight / ops.where(total > 0, total, 1), 0)
    return largest, total, share


def moved(average, value, coefficient):
    """The average after one more value, not the first."""
    return average + coefficient * (value - average)


def moved_exactly(average, error, value, coefficient):
    """As `moved`, but what rounding cuts off is kept for the next time.

    A running mean in float32 stands still once its steps fall below 6e-8 of
    it, after some ten thousand values.

    Returns:
        The average and the new `error`.
    """
    step = exact_step(average, error, value, coefficient)
    new = average + step
    return new, step - (new - average)


def exact_step(average, error, value, coefficient):
    """By how much `moved_exactly` would move the average without rounding."""
    return coefficient * (value - average) + error
