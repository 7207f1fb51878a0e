"""WeightAveraging: a running average of the weights of any optimizer."""

import warnings
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_fraction
from keras_stab.backend import averages
from keras_stab.backend import tracing
from keras_stab.backend import update_kernel
from keras_stab.backend import updates
from keras_stab.nesting import nest
from keras_stab.optimizers.averaging.averaging_rules import checked_rule
from keras_stab.optimizers.averaging.averaging_rules import coefficient
from keras_stab.optimizers.averaging.averaging_rules import (
    refuse_other_averages,
)
from keras_stab.optimizers.averaging.averaging_rules import rule
from keras_stab.optimizers.lent_weights import LendsWeights
from keras_stab.optimizers.nest_checks import always_updates
from keras_stab.optimizers.nest_checks import evaluations_per_step
from keras_stab.optimizers.state import add_slot
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.wrapper import Wrapper
from keras_stab.registration import registered
from keras_stab.types import Tensor


@registered
class WeightAveraging(LendsWeights, Wrapper):
    r"""Keeps a running average of the weights, for evaluation.

    The inner optimizer trains as if it were alone. After each of its updates
    $t = 0, 1, \dots$ with $t \ge t_0$ and $t - t_0$ a multiple of the period,
    with n weights averaged before,

    $$
    a \leftarrow w \;\; (n = 0), \qquad
    a \leftarrow a + c_n (w - a), \qquad n \leftarrow n + 1
    $$

    | method | $c_n$ |
    |---|---|
    | `"uniform"` | $1 / (n + 1)$: the mean (averaged SGD, SWA) |
    | `"ema"` | $1 - \beta$, $\beta$ = `decay` |
    | with `warmup_gamma` | $\max(1 - \beta, (1 + n / \gamma)^{-p})$ |
    | with `dynamic` | $\max(1 - \beta, 9 / (10 + n))$ |
    | `"polynomial"` | $(g + 1) / (n + g + 1)$, $g$ = `exponent` |
    | `"power"` | $1 - (1 - 1 / (n + 1))^{g + 1}$, $g$ from `relative_std` |

    A large constant learning rate, kept in the tail that is averaged, is what
    averaging needs (`AveragedSGD`, `ConstantTail`). `fit` evaluates, and
    ends, with the average; elsewhere use `averaged_weights`. Batch-norm
    statistics have to be computed again for it:
    `AveragedWeights(batch_norm_data=...)`.

    Args:
        inner_optimizer: Keras optimizer, name or config. Defaults to `"sgd"`.
        method: A name of the table. Defaults to `"uniform"`.
        start_step: Int, $t_0$: index of the first update that is averaged.
            `from_run` computes it from the length of a run. Defaults to 0.
        period: Int, at least 1, updates from one average to the next.
            Defaults to 1.
        decay: Float in [0, 1), $\beta$. Defaults to 0.999.
        warmup_gamma: Float, $\gamma$, or `None` for no warm-up of the decay.
            Defaults to `None`.
        warmup_power: Float, $p$. Defaults to 2/3.
        dynamic: Whether the decay is at most $(1 + n) / (10 + n)$. Defaults
            to `False`.
        exponent: Float, at least 0: 0 is the mean, 3 to 8 favour late
            weights. Defaults to 3.
        relative_std: Float below 0.2887, the width of the averaged stretch
            relative to the length of the run. Defaults to 0.1.
        compensated: Whether to keep what rounding cuts off. A float32 mean
            of 100,000 weights is otherwise off by 3e-4 or more. `None`: for the
            mean of every update. Defaults to `None`.
        name: String or `None`.
        evaluate_with: `"evaluation"`: validation in `fit`, callbacks at the
            end of an epoch and the model after `fit` have the average.
            `"trained"`: the trained weights. Defaults to `"evaluation"`.

    Raises:
        ValueError: If an argument is out of range or belongs to another
            method or optimizer, or the inner optimizer averages too.

    Updates are counted as `iterations` does: once for a window of gradient
    accumulation, not for a step that a loss scaler skips. The average is
    float32 (float64 for float64 weights), even for half-precision weights. A
    run that ends before the first average gives a warning.

    Example:

    >>> import keras, keras_stab
    >>> w = keras.Variable([4.0])
    >>> optimizer = keras_stab.WeightAveraging(keras.optimizers.SGD(1.0))
    >>> for _ in range(3):
    ...     optimizer.apply([keras.ops.ones(1)], [w])
    >>> float(w[0]), float(optimizer.averages[0][0]), optimizer.averaged
    (1.0, 2.0, 3)

    Departures from the paper:
        The body of the paper on averaged SGD was not available to us: its
        constants and tables are unknown here. The first average copies the
        weights under every method (timm's warm-up does so too; TensorFlow's
        `ExponentialMovingAverage` starts from the initial weights).

    Cost: no extra pass. 4 bytes per weight, 8 when compensated; one more
        copy of the weights while the average is in the model.

    References:
        - Nitanda, Kikuchi, Maeda, Wu, 2023, "Why is parameter averaging
          beneficial in SGD? An objective smoothing perspective",
          arXiv:2302.09376
        - Izmailov et al., 2018, "Averaging Weights Leads to Wider Optima and
          Better Generalization", arXiv:1803.05407
        - Karras et al., 2023, "Analyzing and Improving the Training Dynamics
          of Diffusion Models", arXiv:2312.02696
    """

    evaluation_name = "average"
    evaluation_callback = "AveragedWeights"
    averages_weights = True

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "sgd",
        method: str = "uniform",
        start_step: int = 0,
        period: int = 1,
        decay: float | None = None,
        warmup_gamma: float | None = None,
        warmup_power: float | None = None,
        dynamic: bool | None = None,
        exponent: float | None = None,
        relative_std: float | None = None,
        compensated: bool | None = None,
        name: str | None = None,
        evaluate_with: str = "evaluation",
        **kwargs: Any,
    ):
        given = {
            "decay": decay,
            "warmup_gamma": warmup_gamma,
            "warmup_power": warmup_power,
            "dynamic": dynamic,
            "exponent": exponent,
            "relative_std": relative_std,
        }
        arguments = checked_rule(method, given)
        super().__init__(
            inner_optimizer, name=name, evaluate_with=evaluate_with, **kwargs
        )
        self.method = method
        self._arguments = arguments
        self.start_step = checked_count("start_step", start_step, 0)
        self.period = checked_count("period", period, 1)
        self.compensated = checked_boolean(
            "compensated", compensated, optional=True
        )
        refuse_other_averages(type(self).__name__, self.inner_optimizer)

    def _check_cycle(self):
        """Whether averages are taken at the end of a method's steps."""
        count = evaluations_per_step(self.inner_optimizer)
        if (self.start_step + 1) % count or self.period % count:
            raise ValueError(
                f"A step of the inner optimizer takes {count} updates, and in "
                "between the weights are look-ahead points, which would be "
                "averaged too: `start_step + 1` and `period` must be "
                f"multiples of {count}. Received: start_step="
                f"{self.start_step}, period={self.period}"
            )

    @classmethod
    def from_run(
        cls,
        *args: Any,
        epochs: int,
        steps_per_epoch: int,
        tail: float = 0.25,
        **kwargs: Any,
    ) -> "WeightAveraging":
        """The optimizer that averages the last part of a run.

        Args:
            *args: As for the class.
            epochs: Int, epochs of the run.
            steps_per_epoch: Int, batches in an epoch.
            tail: Float in (0, 1], the share of the updates to average.
                Defaults to 0.25.
            **kwargs: As for the class, without `start_step`.
        """
        epochs = checked_count("epochs", epochs, 1)
        steps = checked_count("steps_per_epoch", steps_per_epoch, 1)
        tail = checked_fraction("tail", tail)
        if "start_step" in kwargs:
            raise ValueError(
                "`from_run` computes `start_step`; leave it out. Received: "
                f"start_step={kwargs['start_step']}"
            )
        optimizer = cls(*args, **kwargs)
        total = epochs * steps // _batches_per_update(optimizer)
        start = min(round((1.0 - tail) * total), max(total - 1, 0))
        # The end of a step of the inner optimizer.
        count = evaluations_per_step(optimizer.inner_optimizer)
        optimizer.start_step = start // count * count + count - 1
        return optimizer

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        self._check_cycle()
        self._count = add_state(self, "averaged")
        self._slots = self._add_slots(variables, "average")
        self._errors = []
        compensated = self.compensated
        if compensated is None:
            compensated = self.method == "uniform" and self.period == 1
        if compensated:
            self._errors = self._add_slots(variables, "average_error")

    def _add_slots(self, variables, name):
        # Zeros: the first average takes the weights as they are then. A copy
        # made here would be traced into a step, or share its buffer.
        return [
            None
            if variable.overwrite_with_gradient
            else add_slot(self, variable, name, _slot_dtype(variable))
            for variable in variables
        ]

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        inner = self.inner_optimizer
        before = keras.ops.copy(inner.iterations)
        *gradients, before = updates.barrier([*gradients, before])

        def update():
            updates.apply_gradients(inner, gradients, variables)
            self._average(variables, before)

        if self._errors:
            update()
        else:
            update_kernel.as_one_kernel(inner, gradients, variables, update)

    def _average(self, variables, before):
        due = self._is_due(before)
        count = keras.ops.copy(self._count)
        kept = [i for i, slot in enumerate(self._slots) if slot is not None]
        averages.average(
            due,
            self.period == 1,
            count == 0,
            coefficient(rule(self.method, self._arguments), count),
            [tracing.read(variables[i]) for i in kept],
            [self._slots[i] for i in kept],
            [self._errors[i] for i in kept] if self._errors else [],
        )
        self._count.assign(count + keras.ops.cast(due, "int32"))

    def _is_due(self, before):
        """Whether this update is averaged: a boolean tensor, or `True`."""
        always = always_updates(self.inner_optimizer)
        if always and self.start_step == 0 and self.period == 1:
            return True
        due = before >= self.start_step
        if not always:
            after = keras.ops.convert_to_tensor(self.inner_optimizer.iterations)
            due = keras.ops.logical_and(after > before, due)
        if self.period > 1:
            age = before - self.start_step
            due = keras.ops.logical_and(due, age % self.period == 0)
        return due

    # ---- The average ------------------------------------------------------

    @property
    def averages(self) -> list[keras.Variable | None]:
        """One variable per trainable variable (or `None`), after `build`."""
        return list(self._slots)

    @property
    def averaged(self) -> int:
        """How many updates were averaged; read from the device."""
        if not self.built:
            return 0
        return int(tracing.read(self._count))

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: how far the weights are from their average.

        `distance` is $|w - a| / |w|$ for the trained weights w, 0 before the
        first average; `averaged` is the number of updates averaged.
        """
        return {"averaged": self.averaged, "distance": self.distance()}

    def evaluation_values(self) -> list[Tensor | None]:
        return [None if s is None else s.value for s in self._slots]

    def has_evaluation_weights(self) -> bool:
        return self.averaged > 0

    def remembers(self) -> bool:
        return self.averaged > 0

    def begin_again(self) -> None:
        self._count.assign(0)

    def nothing_to_lend(self) -> str:
        return (
            f"There is no average yet: averaging starts at update "
            f"{self.start_step}. Received: an optimizer after {self.updates} "
            "updates"
        )

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        super().finalize_variable_values(var_list)
        steps = self.updates if self.has_values() else 0
        if steps > 0 and self.averaged == 0:
            warnings.warn(
                f"{type(self).__name__} averaged nothing: training ended "
                f"after {steps} updates and averaging starts at update "
                f"{self.start_step}. Train longer, or choose a smaller "
                "`start_step` (`from_run` computes it from the length of a "
                "run)",
                stacklevel=3,
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "method": self.method,
                "start_step": self.start_step,
                "period": self.period,
                "compensated": self.compensated,
                **self._arguments,
            }
        )
        return config


def _batches_per_update(optimizer):
    for each in nest(optimizer):
        steps = getattr(each, "gradient_accumulation_steps", None)
        if steps:
            return steps
        if getattr(each, "across", None) == "batches":
            return each.groups
    return 1


def _slot_dtype(variable):
    return "float64" if variable.dtype == "float64" else "float32"
