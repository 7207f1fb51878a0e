"""ScheduleFree: averaging in place of momentum and of a schedule."""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.backend import updates
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.train_step import estimate
from keras_stab.optimizers.averaging.averaging_rules import (
    refuse_momentum_and_decay,
)
from keras_stab.optimizers.averaging.averaging_rules import (
    refuse_other_averages,
)
from keras_stab.optimizers.averaging.momentum_free_adam import MomentumFreeAdam
from keras_stab.optimizers.exclusions import as_patterns
from keras_stab.optimizers.exclusions import excluded_variables
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.state import widest_dtype
from keras_stab.optimizers.wrapper import innermost
from keras_stab.registration import registered
from keras_stab.schedules import LinearWarmup
from keras_stab.types import LearningRate


@registered
class ScheduleFree(GradientMethod):
    r"""Trains at a point between the last iterate and the average.

    The model holds the average $x$, at which it is evaluated and saved; the
    optimizer holds the iterate $z$. With the rate $\gamma_k$ of the inner
    optimizer at update k and $\gamma_{\max}$ the largest so far,

    $$
    y = \beta x + (1 - \beta) z, \qquad
    z \leftarrow \text{inner}(z, \nabla f(y)) - \gamma_k \lambda y, \qquad
    x \leftarrow (1 - c) x + c z
    $$

    where $c$ is $(k + 1)^r \gamma_{\max}^p$ over the sum of these so far.
    There is no mode to remember: evaluate, predict, checkpoints and export
    see $x$; only the gradient is taken at $y$.

    `ScheduleFree.sgd(...)` and `ScheduleFree.adamw(...)` are the published
    forms.

    Args:
        inner_optimizer: Keras optimizer without momentum and weight decay,
            name or config. Defaults to `"sgd"`.
        beta: Float in [0, 1), $\beta$; it takes the place of momentum.
            Defaults to 0.9.
        weight_decay: Float, $\lambda$, decoupled, at y. Defaults to 0.0.
        decay_exclude: List of path patterns or variables that are not
            decayed, or `None`. Defaults to `None`.
        step_power: Float, $r$. Defaults to 0.0.
        weight_lr_power: Float, $p$. Defaults to 2.0.
        name: String or `None`.

    Raises:
        ValueError: If an argument is out of range, the inner optimizer has
            momentum or averages too, or weights are of half precision (the
            average would stand still there).
        RuntimeError: If plain gradients are handed to it.

    Batch-norm statistics are gathered at y: call `reestimate_batch_norm`
    before evaluating such a model.

    Example:

    >>> import keras, keras_stab
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> optimizer = keras_stab.ScheduleFree.adamw(0.01, warmup_steps=10)
    >>> model.compile(optimizer=optimizer, loss="mse")
    >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 1))
    >>> history = model.fit(x, y, epochs=2, verbose=0)
    >>> loss = model.evaluate(x, y, verbose=0)  # at the average

    Departures from the paper:
        Its code keeps y and z and rebuilds x when told to; keeping x and z
        is the same sequence. Any optimizer without momentum may be inside.

    Cost: no extra pass; one more copy of the weights (4 bytes per weight).

    References:
        - Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, 2024, "The Road
          Less Scheduled", arXiv:2405.15682
    """

    averages_weights = True

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "sgd",
        beta: float = 0.9,
        weight_decay: float = 0.0,
        decay_exclude: Sequence[str | keras.Variable] | None = None,
        step_power: float = 0.0,
        weight_lr_power: float = 2.0,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self.beta = checked_fraction("beta", beta, zero=True, one=False)
        self.weight_decay_rate = checked_number(
            "weight_decay", weight_decay or 0.0, 0.0
        )
        self.decay_exclude = as_patterns("decay_exclude", decay_exclude)
        self.step_power = checked_number("step_power", step_power, 0.0)
        self.weight_lr_power = checked_number(
            "weight_lr_power", weight_lr_power, 0.0
        )
        refuse_other_averages(type(self).__name__, self.inner_optimizer)
        refuse_momentum_and_decay(innermost(self.inner_optimizer))

    @classmethod
    def sgd(
        cls,
        learning_rate: LearningRate = 1.0,
        warmup_steps: int = 0,
        **kwargs: Any,
    ) -> "ScheduleFree":
        """The SGD form.

        Args:
            learning_rate: Float or schedule. Defaults to 1.0.
            warmup_steps: Int, updates of a linear warm-up of a float rate.
                Defaults to 0.
            **kwargs: As for the class.
        """
        rate = _warmed_up(learning_rate, warmup_steps)
        return cls(keras.optimizers.SGD(rate), **kwargs)

    @classmethod
    def adamw(
        cls,
        learning_rate: LearningRate = 0.0025,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        warmup_steps: int = 0,
        **kwargs: Any,
    ) -> "ScheduleFree":
        """The AdamW form.

        Args:
            learning_rate: Float or schedule. Defaults to 0.0025.
            beta_2, epsilon: As in Adam. Default to 0.999 and 1e-8.
            warmup_steps: As for `sgd`.
            **kwargs: As for the class.
        """
        rate = _warmed_up(learning_rate, warmup_steps)
        return cls(MomentumFreeAdam(rate, beta_2, epsilon), **kwargs)

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        for variable in variables:
            if variable.dtype not in ("float32", "float64"):
                raise ValueError(
                    "ScheduleFree keeps its average in the weights, where "
                    "half precision would make it stand still. Use the "
                    'policy "mixed_bfloat16" or "mixed_float16". Received: '
                    f"{variable.path!r} of dtype {variable.dtype}"
                )
        super().build(variables)
        self._decayed = [
            not excluded
            for excluded in excluded_variables(
                "decay_exclude", self.decay_exclude, False, variables
            )
        ]
        # Taken from the weights at the first update: see `_iterates`.
        self._slots = self.add_optimizer_variables(variables, "iterate")
        self._largest_rate, self._weight_sum = (
            add_state(self, name, dtype=widest_dtype(variables))
            for name in ("largest_rate", "weight_sum")
        )

    def estimate(self, oracle: GradientOracle) -> list[Any]:
        oracle.notes[self] = ()
        shift = [
            None if slot is None else (1.0 - self.beta) * (iterate - value)
            for slot, iterate, value in zip(
                self._slots, self._iterates(oracle.values), oracle.values
            )
        ]
        return estimate(self.inner_optimizer, oracle.moved(shift))

    def _iterates(self, values):
        """z, which starts as a copy of the weights."""
        started = self._weight_sum.value > 0
        return [
            value
            if slot is None
            else keras.ops.where(started, slot.value, value)
            for slot, value in zip(self._slots, values)
        ]

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        ops = keras.ops
        inner = self.inner_optimizer
        points = [ops.copy(v) for v in variables]
        dtype = self._weight_sum.dtype
        # Nothing is assigned before all of these are there.
        gathered = updates.barrier(
            [
                *gradients,
                *points,
                *self._iterates(points),
                ops.copy(inner.iterations),
                ops.cast(ops.copy(inner.learning_rate), dtype),
            ]
        )
        count = len(variables)
        gradients, points = gathered[:count], gathered[count : 2 * count]
        iterates = gathered[2 * count : 3 * count]
        before, rate = gathered[3 * count :]
        for variable, iterate in zip(variables, iterates):
            variable.assign(iterate)
        updates.apply_gradients(inner, gradients, variables)
        updated = ops.convert_to_tensor(inner.iterations) > before
        share = self._share(updated, before, rate)
        for i, variable in enumerate(variables):
            if self._slots[i] is None:
                continue
            new = ops.copy(variable)
            if self.weight_decay_rate and self._decayed[i]:
                between = points[i] + (1.0 - self.beta) * (
                    iterates[i] - points[i]
                )
                decay = ops.cast(rate, new.dtype) * self.weight_decay_rate
                new = new - decay * between
            new = ops.where(updated, new, iterates[i])
            moved = points[i] + ops.cast(share, new.dtype) * (new - points[i])
            self._slots[i].assign(new)
            variable.assign(ops.where(updated, moved, points[i]))

    def _share(self, updated, before, rate):
        """c, the weight of the new iterate in the average."""
        ops = keras.ops
        old_rate, old_sum = self._largest_rate.value, self._weight_sum.value
        # Not `maximum`: on PyTorch that rounds float64 scalars to float32.
        largest = ops.where(rate > old_rate, rate, old_rate)
        step = ops.cast(before, rate.dtype) + 1.0
        weight = ops.power(step, self.step_power) * ops.power(
            largest, self.weight_lr_power
        )
        total = old_sum + weight
        share = ops.where(total > 0, weight / ops.where(total > 0, total, 1), 0)
        self._largest_rate.assign(ops.where(updated, largest, old_rate))
        self._weight_sum.assign(ops.where(updated, total, old_sum))
        return share

    @property
    def iterates(self) -> list[keras.Variable | None]:
        """The variables that hold z after the first update.

        `None` for a variable that is no weight (`overwrite_with_gradient`).
        """
        return list(self._slots)

    def exclude_from_weight_decay(
        self, var_list: Any = None, var_names: Any = None
    ) -> None:
        raise ValueError(
            "ScheduleFree decays weights itself: pass `decay_exclude`, a list "
            "of path patterns or variables. Received: "
            f"var_list={var_list}, var_names={var_names}"
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "beta": self.beta,
                "weight_decay": self.weight_decay_rate,
                "decay_exclude": self.decay_exclude,
                "step_power": self.step_power,
                "weight_lr_power": self.weight_lr_power,
            }
        )
        return config


def _warmed_up(learning_rate, warmup_steps):
    if checked_count("warmup_steps", warmup_steps, 0) == 0:
        return learning_rate
    if not isinstance(learning_rate, (int, float)):
        raise ValueError(
            "`warmup_steps` needs a float `learning_rate`; put the warm-up "
            f"into the schedule. Received: learning_rate={learning_rate!r}"
        )
    return LinearWarmup(learning_rate, warmup_steps)
