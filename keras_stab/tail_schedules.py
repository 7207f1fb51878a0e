"""Learning rates that end constant, for methods that average weights."""

import math

import keras

from keras_stab.optimizers.arguments import checked_choice
from keras_stab.optimizers.arguments import checked_count
from keras_stab.optimizers.arguments import checked_number

SHAPES = ("cosine", "linear", "steps")


@keras.saving.register_keras_serializable(package="keras_stab")
class ConstantTail(keras.optimizers.schedules.LearningRateSchedule):
    r"""Falls from one rate to another and stays there.

    With first rate $b$, tail rate $e$, and $x = (s - d) / (S - d)$ clipped to
    [0, 1] at step s,

    $$
    \gamma(s) = b + (e - b) \, x \;\; \text{(linear)}, \qquad
    \gamma(s) = b + (e - b) \, \tfrac12 (1 - \cos \pi x)
        \;\; \text{(cosine)}
    $$

    or, with `"steps"`, $b (e/b)^{k/K}$ after k of K milestones. What counts
    for an average is how large the tail rate is.

    Args:
        learning_rate: Float, $b$.
        tail_learning_rate: Float, $e$.
        tail_step: Number, $S$, from where the rate is constant. With
            `"steps"` it is the last milestone and is left out.
        decay_from: Number, $d$, until where the rate is $b$. Defaults to 0.
        shape: `"cosine"`, `"linear"` or `"steps"`. Defaults to `"cosine"`.
        milestones: With `"steps"`: list of rising steps. Defaults to `None`.

    The published recipe of SWA is linear with `decay_from` at half and
    `tail_step` at nine tenths of the step at which averaging starts; the
    averaged SGD experiments use cosine or steps. Steps are batches (Keras
    reads schedules at every batch, also when gradients are accumulated).

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

    def __init__(
        self,
        learning_rate,
        tail_learning_rate,
        tail_step=None,
        decay_from=0,
        shape="cosine",
        milestones=None,
    ):
        self.learning_rate = checked_number(
            "learning_rate", learning_rate, 0.0, forbidden=(0.0,)
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
            raise ValueError(
                "`tail_step` must be above `decay_from`. Received: tail_step="
                f"{self.tail_step}, decay_from={self.decay_from}"
            )

    def _check_steps(self):
        given = self.milestones
        if self.tail_step is not None or self.decay_from or not given:
            raise ValueError(
                'shape="steps" takes `milestones`, and neither `tail_step` '
                f"nor `decay_from`. Received: tail_step={self.tail_step}, "
                f"decay_from={self.decay_from}, milestones={given}"
            )
        self.milestones = [checked_number("milestones", m, 0.0) for m in given]
        rising = all(a < b for a, b in zip(given, given[1:]))
        if not rising or self.tail_learning_rate == 0.0:
            raise ValueError(
                "`milestones` must rise and `tail_learning_rate` be above 0. "
                f"Received: milestones={given}, tail_learning_rate="
                f"{self.tail_learning_rate}"
            )

    def __call__(self, step):
        step = keras.ops.cast(step, keras.config.floatx())
        first, last = self.learning_rate, self.tail_learning_rate
        if self.shape == "steps":
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

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "tail_learning_rate": self.tail_learning_rate,
            "tail_step": self.tail_step,
            "decay_from": self.decay_from,
            "shape": self.shape,
            "milestones": self.milestones,
        }


@keras.saving.register_keras_serializable(package="keras_stab")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    r"""Rises linearly and then stays: $b \min(1, (s + 1) / w)$ at step s.

    Args:
        learning_rate: Float, $b$.
        warmup_steps: Int, $w$, at least 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, learning_rate, warmup_steps):
        self.learning_rate = checked_number("learning_rate", learning_rate, 0.0)
        self.warmup_steps = checked_count("warmup_steps", warmup_steps, 1)

    def __call__(self, step):
        step = keras.ops.cast(step, keras.config.floatx())
        gone = keras.ops.clip((step + 1.0) / self.warmup_steps, 0.0, 1.0)
        return self.learning_rate * gone

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
        }
