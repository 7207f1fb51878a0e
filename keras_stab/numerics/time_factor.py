"""The sigmoid-like factor of time of TVLARS."""

import math

import keras

# float32 overflows beyond exp(88.7) and loses digits below exp(-87.3).
_LARGEST_EXPONENT = 80.0


def time_factor(step, decay_rate, delay, alpha, floor, dtype="float32"):
    """`floor + 1 / (alpha + exp(decay_rate (step - delay)))`, in `dtype`.

    For `alpha` > 0 as a sigmoid, which cannot overflow; for `alpha` = 0 the
    exponent is clipped.
    """
    step = keras.ops.cast(step, dtype)
    psi = decay_rate * (step - delay)
    if alpha > 0:
        return floor + keras.ops.sigmoid(math.log(alpha) - psi) / alpha
    bounded = keras.ops.clip(psi, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return floor + keras.ops.exp(-bounded)


def from_durations(hold_steps, decay_steps, alpha):
    """`decay_rate` and `delay` of a factor that falls between two steps.

    It is 90 % of its plateau `1 / alpha` at `hold_steps` and 10 % of it
    `decay_steps` later.
    """
    decay_rate = math.log(81.0) / decay_steps
    delay = hold_steps + decay_steps / 2 - math.log(alpha) / decay_rate
    return decay_rate, delay
