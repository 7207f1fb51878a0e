"""Lookahead: slow weights that follow the fast ones from time to time."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_fraction
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.constraints import is_convex
from keras_stab.nesting import nest
from keras_stab.optimizers.interpolation.inner_state import INNER_STATES
from keras_stab.optimizers.interpolation.inner_state import inner_state_rule
from keras_stab.optimizers.lent_weights import LendsWeights
from keras_stab.optimizers.nest_checks import evaluations_per_step
from keras_stab.optimizers.nest_checks import refuse_accumulating_parts
from keras_stab.optimizers.nest_checks import refuse_averages_inside
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.state import moving
from keras_stab.optimizers.wrapper import Wrapper
from keras_stab.registration import registered
from keras_stab.types import Tensor

# The longest cycle in which computing both sides of a condition is quicker.
OFTEN = 3


@registered
class Lookahead(LendsWeights, Wrapper):
    r"""Steps back, after k steps, to a point between start and end.

    The inner optimizer makes k steps from the slow weights $z$, to $w_k$;
    then both sets of weights are

    $$
    z \leftarrow z + \alpha (w_k - z)
    $$

    That damps rotation, which is what simultaneous gradient steps do in games
    (GANs), and the noise of the last steps.

    Args:
        inner_optimizer: Keras optimizer, name or config; one of ours, or a
            `MultiOptimizer` of several players, too. Defaults to `"adam"`.
        sync_period: Int, k, at least 1, in steps of the inner method: around
            `ExtraGradient` or `CEGPlus` a step is two gradients
            (`evaluations_per_step`). Defaults to 5.
        slow_step_size: Float in (0, 1], $\alpha$; with 1 it is the inner
            optimizer. Defaults to 0.5.
        inner_state: What becomes of the inner optimizer's own state at a
            synchronisation. `"keep"`: nothing. `"reset"`: every slot and the
            step count start again. `"pullback"`: momentum becomes
            $\alpha m + (1 - \alpha) m'$ with $m'$ its value after the last
            synchronisation. Defaults to `"keep"`.
        name: String or `None`.
        evaluate_with: `"evaluation"`: validation in `fit`, callbacks at the
            end of an epoch and the model after `fit` have the slow weights.
            `"trained"`: the trained weights. Defaults to `"evaluation"`.

    Raises:
        ValueError: If an argument is out of range; if periods of nested
            Lookaheads do not divide each other; if the inner optimizer
            averages; if `"reset"` meets a schedule, which counts the steps
            that are forgotten, or `"pullback"` an optimizer without momentum.

    Slow weights are taken from the model at the start of every cycle. If
    other weights are put into the model during a cycle, the next `fit` begins
    a new one, with a warning; `restart` does so by hand. Steps are real
    updates: a window of accumulated gradients is one, a step that a loss
    scaler skips does not count. Batch-norm statistics are those of the fast
    weights.

    The model holds the fast weights between two synchronisations. `fit`
    evaluates, and ends, with the slow ones; elsewhere use `with
    optimizer.swap_weights(model):`.

    Example: gradient steps of size 1 in the game $x y$, where they diverge;
    four of them and one synchronisation lead to the solution.

    >>> import keras, keras_stab
    >>> x, y = keras.Variable(1.0), keras.Variable(0.5)
    >>> optimizer = keras_stab.Lookahead(
    ...     keras.optimizers.SGD(1.0), sync_period=4, slow_step_size=0.2
    ... )
    >>> for _ in range(4):
    ...     gradients = [y + 0.0, -(x + 0.0)]
    ...     optimizer.apply(gradients, [x, y])
    >>> abs(round(float(x), 5)), abs(round(float(y), 5))
    (0.0, 0.0)

    Departures from the paper:
        The default $\alpha$ is 0.5, as in the literature on games (Zhang et
        al. use 0.8 in their code).

    Cost: no extra gradient; one more copy of the weights. Lookahead inherits
        the convergence of its inner method, where that has one: CEG+ or
        extragradient under their own conditions. There is no guarantee for
        gradient steps and k > 2 in a nonmonotone game.

    References:
        - Zhang, Lucas, Hinton, Ba, 2019, "Lookahead Optimizer: k steps
          forward, 1 step back", arXiv:1907.08610
        - Chavdarova, Pagliardini, Stich, Fleuret, Jaggi, 2021, "Taming GANs
          with Lookahead-Minmax", arXiv:2006.14567
        - Pethick, Xie, Cevher, 2023, "Stable Nonconvex-Nonconcave Training
          via Linear Interpolation", arXiv:2310.13459
    """

    evaluation_name = "set of slow weights"

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "adam",
        sync_period: int = 5,
        slow_step_size: float = 0.5,
        inner_state: str = "keep",
        name: str | None = None,
        evaluate_with: str = "evaluation",
        **kwargs: Any,
    ):
        super().__init__(
            inner_optimizer, name=name, evaluate_with=evaluate_with, **kwargs
        )
        self.sync_period = checked_count("sync_period", sync_period, 1)
        self.slow_step_size = checked_fraction("slow_step_size", slow_step_size)
        self.inner_state = checked_choice(
            "inner_state", inner_state, INNER_STATES
        )
        inner = self.inner_optimizer
        refuse_averages_inside("Lookahead", inner)
        refuse_accumulating_parts("Lookahead", inner)
        self._check_period(inner)
        self._rule = inner_state_rule(inner_state, inner)

    def _check_period(self, inner):
        for each in nest(inner):
            period = getattr(each, "sync_period", 1)
            if self.sync_period % period:
                raise ValueError(
                    "The period of a Lookahead around another one must be a "
                    "multiple of its period, or inner cycles are cut short. "
                    f"Received: sync_period={self.sync_period} around "
                    f"sync_period={period}"
                )

    @property
    def evaluations_per_step(self) -> int:
        """Gradients that make one step of the inner method."""
        return evaluations_per_step(self.inner_optimizer)

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        # Only now are all parts of the inner optimizer known.
        self._length = self.sync_period * self.evaluations_per_step
        self._position = add_state(self, "position")
        self._slots = [
            None
            if variable.overwrite_with_gradient
            else self.add_variable_from_reference(variable, "slow")
            for variable in variables
        ]
        self._rule.build(self)

    @property
    def iterations(self) -> keras.Variable:
        return self._rule.iterations()

    def apply_in_order(
        self, gradients: list[Any], variables: list[keras.Variable]
    ) -> None:
        ops = keras.ops
        inner = self.inner_optimizer
        kept = [i for i, slot in enumerate(self._slots) if slot is not None]
        all_fast = [variables[i] for i in kept]
        all_slow = [self._slots[i] for i in kept]
        kept = moving(gradients, variables, self._slots)
        fast = [variables[i] for i in kept]
        slow = [self._slots[i] for i in kept]
        position = ops.copy(self._position.value)
        before = self.completed_updates()
        *gradients, position, before = updates.barrier(
            [*gradients, position, before]
        )
        # At every start, not once: weights may have been loaded since.
        updates.assign_if(
            position == 0,
            self._length <= OFTEN,
            all_slow,
            lambda: list(map(tracing.read, all_fast)),
        )
        updates.apply_gradients(inner, gradients, variables)
        made = self.completed_updates() - before
        position = position + made
        due = position >= self._length
        # The slow ones follow at the start of the next cycle.
        # On JAX one more operation in the loop that made the fast weights; a
        # branch would copy all of them in every step.
        updates.assign_if(due, True, fast, lambda: self._between(slow, fast))
        self._position.assign(
            ops.where(due, ops.zeros_like(position), position)
        )
        self._rule.apply(due, made, self.slow_step_size)

    def _between(self, slow, fast):
        values = list(map(tracing.read, fast))
        if self.slow_step_size < 1.0:
            values = many_tensors.each_between(
                list(map(tracing.read, slow)), values, self.slow_step_size
            )
        # Between two points of a convex set there is nothing to project.
        return [
            value if is_convex(v.constraint) else v.constraint(value)
            for v, value in zip(fast, values)
        ]

    @property
    def slow_weights(self) -> list[keras.Variable | None]:
        """One variable per trainable variable (or `None`), after `build`.

        They hold the slow weights from the first step of a cycle on.
        """
        return list(self._slots)

    def remembers(self) -> bool:
        return int(tracing.read(self._position)) > 0

    def begin_again(self) -> None:
        self._position.assign(0)

    @property
    def cycle_length(self) -> int:
        return self._length

    def evaluation_values(self) -> list[Tensor | None]:
        if not self.built:
            return []
        at_rest = not self.remembers()
        values = [
            None if slot is None or at_rest else tracing.read(slot)
            for slot in self._slots
        ]
        for each in nest(self.inner_optimizer):
            # Weights that may leave their sets between two steps.
            if hasattr(each, "feasible"):
                weights = keras_internals.built_variables(self)
                return each.feasible(
                    list(map(tracing.read, weights)) if at_rest else values
                )
        return values

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: the distance of fast and slow weights.

        `phase` counts the updates since the last synchronisation.
        """
        phase = tracing.read(self._position) if self.built else 0
        return {"distance": self.distance(), "phase": phase}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "sync_period": self.sync_period,
                "slow_step_size": self.slow_step_size,
                "inner_state": self.inner_state,
            }
        )
        return config
