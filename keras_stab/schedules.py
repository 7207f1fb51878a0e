"""Learning-rate schedules, for any optimizer.

For large batches, and with a constant end for methods that average weights.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.arguments import refuse_numbers
from keras_stab.numerics.time_factor import time_factor
from keras_stab.registration import registered
from keras_stab.types import Tensor

__all__ = [
    "ConstantTail",
    "LinearWarmup",
    "TimeVaryingSigmoid",
    "WarmupCosine",
    "WarmupPolynomial",
]


def __dir__():
    return __all__


SHAPES = ("cosine", "linear", "steps")


class _Configured(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule whose arguments are its attributes."""

    arguments: tuple[str, ...] = ()

    def get_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.arguments}


@registered
class WarmupPolynomial(_Configured):
    r"""A linear warm-up, then a polynomial decay.

    With base rate $b$, end rate $e$, $w$ steps of warm-up, $T$ in all and
    $D = T - w + 1$:

    $$
    \gamma(s) = b \, s / w \;\; (s \le w), \qquad
    \gamma(s) = (b - e) \Big(1 - \frac{\min(s - w, D)}{D}\Big)^p + e
    $$

    Args:
        learning_rate: Float, $b$, at least 0.
        warmup_steps: Number of steps, $w$, at least 0.
        total_steps: Number of steps, $T$, above $w$.
        end_learning_rate: Float, $e$, at least 0. Defaults to 1e-4.
        power: Float, $p$, at least 0. Defaults to 2.

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
        learning_rate: float,
        warmup_steps: float,
        total_steps: float,
        end_learning_rate: float = 1e-4,
        power: float = 2,
    ) -> None:
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.warmup_steps = checked_number("warmup_steps", warmup_steps, 0.0)
        self.total_steps = _after(total_steps, self.warmup_steps)
        self.end_learning_rate = checked_number(
            "end_learning_rate", end_learning_rate, 0.0
        )
        self.power = checked_number("power", power, 0.0)

    def __call__(self, step: int | Tensor) -> Tensor:
        step = keras.ops.cast(step, _dtype())
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


@registered
class WarmupCosine(_Configured):
    r"""A linear warm-up, then half a cosine.

    With base rate $b$, end factor $f$, $w$ steps of warm-up and $T$ in all:

    $$
    \gamma(s) = b \, s / w \;\; (s < w), \qquad
    \gamma(s) = b \, (q + f (1 - q)), \quad
    q = \tfrac12 \Big(1 + \cos \pi \frac{s - w}{T - w}\Big)
    $$

    Args:
        learning_rate: Float, $b$, at least 0.
        warmup_steps: Number of steps, $w$, at least 0.
        total_steps: Number of steps, $T$, above $w$; after them the rate stays
            at $b f$.
        end_factor: Float, $f$, at least 0. Defaults to 1e-3.

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
        self,
        learning_rate: float,
        warmup_steps: float,
        total_steps: float,
        end_factor: float = 1e-3,
    ) -> None:
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.warmup_steps = checked_number("warmup_steps", warmup_steps, 0.0)
        self.total_steps = _after(total_steps, self.warmup_steps)
        self.end_factor = checked_number("end_factor", end_factor, 0.0)

    def __call__(self, step: int | Tensor) -> Tensor:
        step = keras.ops.cast(step, _dtype())
        ramp = step / max(self.warmup_steps, 1.0)
        length = self.total_steps - self.warmup_steps
        gone = keras.ops.clip((step - self.warmup_steps) / length, 0.0, 1.0)
        cosine = 0.5 * (1.0 + keras.ops.cos(math.pi * gone))
        factor = cosine + self.end_factor * (1.0 - cosine)
        factor = keras.ops.where(step < self.warmup_steps, ramp, factor)
        return self.learning_rate * factor


@registered
class TimeVaryingSigmoid(_Configured):
    r"""The factor of time of `TVLARS` as a schedule, for any optimizer.

    $$
    \gamma(t) = b \Big( \phi_{\min} +
        \frac{1}{\alpha + e^{\lambda (t - d_e)}} \Big)
    $$

    Here the factor is outside of the momentum buffer, so that while it falls
    quickly the weights take a different path than with `TVLARS`.

    Args:
        learning_rate: Float, $b$, at least 0.
        decay_rate: Float, $\lambda$, at least 0, per step.
        delay: Float, $d_e$, in steps; may be negative.
        alpha: Float, $\alpha$, at least 0. Defaults to 1.0.
        floor: Float, $\phi_{\min}$, at least 0. Defaults to 1e-3.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import keras_stab
    >>> schedule = keras_stab.TimeVaryingSigmoid(2.0, 0.1, delay=50)
    >>> round(float(schedule(50)), 3)
    1.002
    """

    arguments = ("learning_rate", "decay_rate", "delay", "alpha", "floor")

    def __init__(
        self,
        learning_rate: float,
        decay_rate: float,
        delay: float,
        alpha: float = 1.0,
        floor: float = 1e-3,
    ) -> None:
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.decay_rate = checked_number("decay_rate", decay_rate, 0.0)
        self.delay = checked_number("delay", delay)
        self.alpha = checked_number("alpha", alpha, 0.0)
        self.floor = checked_number("floor", floor, 0.0)

    def __call__(self, step: int | Tensor) -> Tensor:
        shape = self.decay_rate, self.delay, self.alpha, self.floor
        return self.learning_rate * time_factor(step, *shape, _dtype())


@registered
class ConstantTail(_Configured):
    r"""Falls from one rate to another and stays there.

    With first rate $b$, tail rate $e$, and $x = (s - d) / (S - d)$ clipped to
    [0, 1] at step s,

    $$
    \gamma(s) = b + (e - b) \, x \;\; \text{(linear)}, \qquad
    \gamma(s) = b + (e - b) \, \tfrac12 (1 - \cos \pi x)
        \;\; \text{(cosine)}
    $$

    or, with `"steps"`, $b (e/b)^{k/K}$ after k of K milestones. For averaged
    weights the size of the tail rate matters most.

    Args:
        learning_rate: Float, $b$.
        tail_learning_rate: Float, $e$.
        tail_step: Number, $S$, the step from which the rate is constant. With
            `"steps"` that is the last milestone: leave `tail_step` out.
        decay_from: Number, $d$, the step up to which the rate is $b$. Defaults
            to 0.
        shape: `"cosine"`, `"linear"` or `"steps"`. Defaults to `"cosine"`.
        milestones: With `"steps"`: list of rising steps. Defaults to `None`.

    The published recipe of SWA is linear with `decay_from` at half and
    `tail_step` at nine tenths of the step at which averaging starts; the
    averaged SGD experiments use cosine or steps. Steps are batches (Keras
    reads schedules at every batch, even when gradients are accumulated).

    Raises:
        ValueError: If an argument is out of range or does not fit `shape`.

    Example:

    >>> import keras_stab
    >>> schedule = keras_stab.ConstantTail(0.1, 0.02, tail_step=100)
    >>> [round(float(schedule(s)), 3) for s in (0, 50, 100, 200)]
    [0.1, 0.06, 0.02, 0.02]

    References:
        - Izmailov et al., 2018, "Averaging Weights Leads to Wider Optima and
          Better Generalization", arXiv:1803.05407
        - Nitanda, Kikuchi, Maeda, Wu, 2023, "Why is parameter averaging
          beneficial in SGD? An objective smoothing perspective",
          arXiv:2302.09376
    """

    arguments = (
        "learning_rate",
        "tail_learning_rate",
        "tail_step",
        "decay_from",
        "shape",
        "milestones",
    )

    def __init__(
        self,
        learning_rate: float,
        tail_learning_rate: float,
        tail_step: float | None = None,
        decay_from: float = 0,
        shape: str = "cosine",
        milestones: Sequence[float] | None = None,
    ) -> None:
        self.learning_rate = checked_number(
            "learning_rate", learning_rate, above=0.0
        )
        self.tail_learning_rate = checked_number(
            "tail_learning_rate", tail_learning_rate, 0.0
        )
        self.shape = checked_choice("shape", shape, SHAPES)
        self.decay_from = checked_number("decay_from", decay_from, 0.0)
        self.tail_step, self.milestones = tail_step, milestones
        if shape == "steps":
            self._check_steps()
            return
        if milestones is not None or tail_step is None:
            raise ValueError(
                f'shape="{shape}" takes `tail_step` and no `milestones`. '
                f"Received: tail_step={tail_step}, milestones={milestones}"
            )
        self.tail_step = checked_number("tail_step", tail_step)
        if self.tail_step <= self.decay_from:
            refuse_numbers(
                "`tail_step` must be above `decay_from`. Received: tail_step="
                f"{self.tail_step}, decay_from={self.decay_from}"
            )

    def _check_steps(self):
        given = self.milestones
        if isinstance(given, np.ndarray):
            given = given.tolist()
        listed = isinstance(given, (list, tuple)) and len(given) > 0
        if self.tail_step is not None or self.decay_from or not listed:
            raise ValueError(
                'shape="steps" takes `milestones`, a list, and no `tail_step` '
                f"or `decay_from`. Received: tail_step={self.tail_step}, "
                f"decay_from={self.decay_from}, milestones={given}"
            )
        self.milestones = [checked_number("milestones", m, 0.0) for m in given]
        rising = all(a < b for a, b in itertools.pairwise(self.milestones))
        if not rising or self.tail_learning_rate == 0.0:
            raise ValueError(
                "`milestones` must rise and `tail_learning_rate` be above 0. "
                f"Received: milestones={given}, tail_learning_rate="
                f"{self.tail_learning_rate}"
            )

    def __call__(self, step: int | Tensor) -> Tensor:
        step = keras.ops.cast(step, _dtype())
        first, last = self.learning_rate, self.tail_learning_rate
        if self.milestones is not None:
            passed = sum(
                keras.ops.cast(step >= m, step.dtype) for m in self.milestones
            )
            ratio = math.log(last / first) / len(self.milestones)
            return first * keras.ops.exp(ratio * passed)
        length = self.tail_step - self.decay_from
        gone = keras.ops.clip((step - self.decay_from) / length, 0.0, 1.0)
        if self.shape == "cosine":
            gone = 0.5 * (1.0 - keras.ops.cos(math.pi * gone))
        return first + (last - first) * gone


@registered
class LinearWarmup(_Configured):
    r"""Rises linearly and then stays: $b \min(1, (s + 1) / w)$ at step s.

    Args:
        learning_rate: Float, $b$.
        warmup_steps: Int, $w$, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> from keras_stab.schedules import LinearWarmup
    >>> schedule = LinearWarmup(0.1, 4)
    >>> [round(float(schedule(s)), 3) for s in (0, 1, 3, 9)]
    [0.025, 0.05, 0.1, 0.1]
    """

    arguments = ("learning_rate", "warmup_steps")

    def __init__(self, learning_rate: float, warmup_steps: int) -> None:
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.warmup_steps = checked_count("warmup_steps", warmup_steps, 1)

    def __call__(self, step: int | Tensor) -> Tensor:
        step = keras.ops.cast(step, _dtype())
        gone = keras.ops.clip((step + 1.0) / self.warmup_steps, 0.0, 1.0)
        return self.learning_rate * gone


def _dtype():
    """Half precision could hold neither steps nor rates."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


def _after(total_steps, warmup_steps):
    total_steps = checked_number("total_steps", total_steps)
    if total_steps <= warmup_steps:
        refuse_numbers(
            "`total_steps` must be above `warmup_steps`. Received: "
            f"total_steps={total_steps}, warmup_steps={warmup_steps}"
        )
    return total_steps
