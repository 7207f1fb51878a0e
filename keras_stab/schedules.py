"""Learning-rate schedules of large-batch training, for any optimizer."""

import math

import keras

from keras_stab.numerics.time_factor import time_factor
from keras_stab.optimizers.arguments import checked_number

_Schedule = keras.optimizers.schedules.LearningRateSchedule


class _Configured(_Schedule):
    """A schedule whose arguments are its attributes."""

    arguments = ()

    def get_config(self):
        return {name: getattr(self, name) for name in self.arguments}


@keras.saving.register_keras_serializable(package="keras_stab")
class WarmupPolynomial(_Configured):
    r"""A linear warm-up, then a polynomial decay.

    With base rate $b$, end rate $e$, $w$ steps of warm-up, $T$ in all and
    $D = T - w + 1$:

    $$
    \gamma(s) = b \, s / w \;\; (s \le w), \qquad
    \gamma(s) = (b - e) \Big(1 - \frac{\min(s - w, D)}{D}\Big)^p + e
    $$

    Args:
        learning_rate: $b$.
        warmup_steps: $w$, at least 0.
        total_steps: $T$, above $w$.
        end_learning_rate: $e$. Defaults to 1e-4.
        power: $p$. Defaults to 2.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import keras_stab
    >>> schedule = keras_stab.WarmupPolynomial(10.0, 5, 20)
    >>> [round(float(schedule(s)), 3) for s in (0, 5, 6)]
    [0.0, 10.0, 8.789]

    References:
        - MLCommons, training reference of ResNet-50 with LARS
    """

    arguments = (
        "learning_rate",
        "warmup_steps",
        "total_steps",
        "end_learning_rate",
        "power",
    )

    def __init__(
        self,
        learning_rate,
        warmup_steps,
        total_steps,
        end_learning_rate=1e-4,
        power=2,
    ):
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.warmup_steps = checked_number("warmup_steps", warmup_steps, 0.0)
        self.total_steps = _after(total_steps, self.warmup_steps)
        self.end_learning_rate = checked_number(
            "end_learning_rate", end_learning_rate, 0.0
        )
        self.power = checked_number("power", power, 0.0)

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        ramp = self.learning_rate * step / max(self.warmup_steps, 1.0)
        length = self.total_steps - self.warmup_steps + 1.0
        gone = keras.ops.clip(step - self.warmup_steps, 0.0, length) / length
        span = self.learning_rate - self.end_learning_rate
        decayed = (
            span * keras.ops.power(1.0 - gone, self.power)
            + self.end_learning_rate
        )
        if self.warmup_steps == 0:
            return decayed
        return keras.ops.where(step <= self.warmup_steps, ramp, decayed)


@keras.saving.register_keras_serializable(package="keras_stab")
class WarmupCosine(_Configured):
    r"""A linear warm-up, then half a cosine.

    With base rate $b$, end factor $f$, $w$ steps of warm-up and $T$ in all:

    $$
    \gamma(s) = b \, s / w \;\; (s < w), \qquad
    \gamma(s) = b \, (q + f (1 - q)), \quad
    q = \tfrac12 \Big(1 + \cos \pi \frac{s - w}{T - w}\Big)
    $$

    Args:
        learning_rate: $b$.
        warmup_steps: $w$, at least 0.
        total_steps: $T$, above $w$; from there on the end rate $b f$ stays.
        end_factor: $f$. Defaults to 1e-3.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import keras_stab
    >>> schedule = keras_stab.WarmupCosine(1.0, 10, 110)
    >>> [round(float(schedule(s)), 3) for s in (5, 10, 60, 110)]
    [0.5, 1.0, 0.5, 0.001]
    """

    arguments = ("learning_rate", "warmup_steps", "total_steps", "end_factor")

    def __init__(
        self, learning_rate, warmup_steps, total_steps, end_factor=1e-3
    ):
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.warmup_steps = checked_number("warmup_steps", warmup_steps, 0.0)
        self.total_steps = _after(total_steps, self.warmup_steps)
        self.end_factor = checked_number("end_factor", end_factor, 0.0)

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        ramp = step / max(self.warmup_steps, 1.0)
        length = self.total_steps - self.warmup_steps
        gone = keras.ops.clip((step - self.warmup_steps) / length, 0.0, 1.0)
        cosine = 0.5 * (1.0 + keras.ops.cos(math.pi * gone))
        factor = cosine + self.end_factor * (1.0 - cosine)
        factor = keras.ops.where(step < self.warmup_steps, ramp, factor)
        return self.learning_rate * factor


@keras.saving.register_keras_serializable(package="keras_stab")
class TimeVaryingSigmoid(_Configured):
    r"""The factor of time of `TVLARS` as a schedule, for any optimizer.

    $$
    \gamma(t) = b \Big( \phi_{\min} +
        \frac{1}{\alpha + e^{\lambda (t - d_e)}} \Big)
    $$

    Here the factor is outside of the momentum buffer: while it falls quickly
    this is not the trajectory of `TVLARS`.

    Args:
        learning_rate: $b$.
        decay_rate: $\lambda$, at least 0, per step.
        delay: $d_e$, in steps.
        alpha: $\alpha$, at least 0. Defaults to 1.0.
        floor: $\phi_{\min}$, at least 0. Defaults to 1e-3.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import keras_stab
    >>> schedule = keras_stab.TimeVaryingSigmoid(2.0, 0.1, delay=50)
    >>> round(float(schedule(50)), 3)
    1.002
    """

    arguments = ("learning_rate", "decay_rate", "delay", "alpha", "floor")

    def __init__(self, learning_rate, decay_rate, delay, alpha=1.0, floor=1e-3):
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.decay_rate = checked_number("decay_rate", decay_rate, 0.0)
        self.delay = checked_number("delay", delay)
        self.alpha = checked_number("alpha", alpha, 0.0)
        self.floor = checked_number("floor", floor, 0.0)

    def __call__(self, step):
        return self.learning_rate * time_factor(
            step, self.decay_rate, self.delay, self.alpha, self.floor
        )


def _after(total_steps, warmup_steps):
    total_steps = checked_number("total_steps", total_steps)
    if total_steps <= warmup_steps:
        raise ValueError(
            "`total_steps` must be above `warmup_steps`. Received: "
            f"total_steps={total_steps}, warmup_steps={warmup_steps}"
        )
    return total_steps
