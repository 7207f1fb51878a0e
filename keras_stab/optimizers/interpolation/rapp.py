"""RAPP: the relaxed approximate proximal point method."""

import warnings
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_fraction
from keras_stab.backend import devices
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.constraints import ConvexSet
from keras_stab.optimizers.interpolation.phase_optimizer import PhaseOptimizer
from keras_stab.optimizers.state import add_state
from keras_stab.registration import registered
from keras_stab.types import LearningRate
from keras_stab.types import Tensor


@registered
class RAPP(PhaseOptimizer):
    r"""Goes a part of the way to an approximate proximal point.

    With the field $F$ of all players (the gradient, where there is one loss),
    $w_0 = z$ and $t < \tau$,

    $$
    w_{t+1} = \mathrm{prox}_{\gamma}(z - \gamma F(w_t)), \qquad
    z \leftarrow (1 - \lambda) z + \lambda w_\tau
    $$

    Every inner step starts from the anchor $z$: it is the fixed-point
    iteration for the implicit step $w = \mathrm{prox}(z - \gamma F(w))$ and
    shrinks its error by $\gamma L$, $L$ the Lipschitz constant of $F$. So
    choose $\gamma L$ between 0.7 and 0.9. $\tau = 2$ is EG+, $\tau = 1$ a
    relaxed forward-backward step, $\lambda = 1$ the unrelaxed method.

    Args:
        learning_rate: $\gamma$: float, schedule or callable; a step keeps
            the rate of its first gradient. Defaults to 0.1.
        inner_steps: Int, $\tau$, at least 1: gradients, each from its own
            batch, from one anchor to the next. Defaults to 3.
        relaxation: Float in (0, 1], $\lambda$. Defaults to 0.5.
        proximal: `None` for each variable's own constraint; one operator of
            `keras_stab.constraints` for all; or a dict from regular
            expressions for variable paths to operators. Defaults to `None`.
        track_diagnostics: Whether to keep what `diagnostics` reports: two more
            norms per gradient. Defaults to `False`.
        name: String or `None`.
        evaluate_with: `"evaluation"`: validation in `fit`, callbacks at the
            end of an epoch and the model after `fit` have the anchor.
            `"trained"`: the trained weights. Defaults to `"evaluation"`.
        **kwargs: Further arguments of every Keras optimizer: clipping,
            `loss_scale_factor`, `gradient_accumulation_steps`.

    Raises:
        ValueError: If an argument is out of range, for `weight_decay`,
            `use_ema` and constraints that are not convex.

    Between anchors the model holds the points $w_t$. `fit` evaluates, and
    ends, with the anchor; elsewhere use
    `with optimizer.swap_weights(model):`.

    Example: the game $x y$, in which gradient steps diverge.

    >>> import keras, keras_stab
    >>> x, y = keras.Variable(1.0), keras.Variable(0.5)
    >>> optimizer = keras_stab.RAPP(0.5, inner_steps=3, relaxation=0.5)
    >>> for _ in range(3):
    ...     gradients = [y + 0.0, -(x + 0.0)]
    ...     optimizer.apply(gradients, [x, y])
    >>> float(x), float(y)
    (0.78125, 0.625)

    Departures from the paper:
        None in the rule. Its code makes one inner step too few in the first
        cycle, updates players in turn, and does not save the anchor.

    Cost: `inner_steps` gradients per step; one more copy of the weights.

    Convergence (last iterate): $\gamma L < 1$ and an operator, constraints
        included, that is $\rho$-comonotone with $\rho > -1/(2L)$, with
        $\tau$ growing slowly. For a fixed $\tau$ stability does not grow
        with $\tau$ when $\gamma L$ is near 1.

    References:
        - Pethick, Xie, Cevher, 2023, "Stable Nonconvex-Nonconcave Training
          via Linear Interpolation", arXiv:2310.13459
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.1,
        inner_steps: int = 3,
        relaxation: float = 0.5,
        proximal: Callable | dict[str, Callable] | None = None,
        track_diagnostics: bool = False,
        name: str | None = None,
        evaluate_with: str = "evaluation",
        **kwargs: Any,
    ):
        inner_steps = checked_count("inner_steps", inner_steps, 1)
        super().__init__(
            learning_rate,
            proximal,
            inner_steps,
            name,
            evaluate_with=evaluate_with,
            **kwargs,
        )
        self.inner_steps = inner_steps
        self.track_diagnostics = checked_boolean(
            "track_diagnostics", track_diagnostics
        )
        self.relaxation = checked_fraction("relaxation", relaxation)
        if self.relaxation == 1.0:
            warnings.warn(
                "relaxation=1 is the unrelaxed method, which no theorem "
                "covers: choose a relaxation below 1, 0.5 as a rule",
                stacklevel=2,
            )

    @property
    def evaluations_per_step(self) -> int:
        """Gradients from one anchor to the next."""
        return self.inner_steps

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self._anchors = self.add_optimizer_variables(variables, "anchor")
        if self.track_diagnostics:
            if devices.replicas() > 1:
                raise ValueError(
                    "`track_diagnostics` needs the weights of the whole model "
                    "at once, which tf.distribute does not give: leave it "
                    f"out. Received: {devices.replicas()} replicas"
                )
            self._length, self._residual, self._contraction = (
                add_state(self, name, dtype="float32")
                for name in ("length", "residual", "contraction")
            )

    def move(
        self,
        indices: list[int],
        gradients: list[Any],
        values: list[Tensor],
        variables: list[keras.Variable],
    ) -> None:
        phase = self.phase()
        slots = [self._anchors[i] for i in indices]
        # At every start, not once: weights may have been loaded since.
        anchors = updates.choose(
            phase == 0,
            lambda: self._feasible_at_first(indices, values),
            lambda: many_tensors.each_value(slots),
        )
        last = phase == self.inner_steps - 1
        rate = self._step_size.value
        # In the last step too, keeping them does no harm: the next cycle
        # starts from the weights.
        many_tensors.assign_each(self, slots, anchors)
        if not self.track_diagnostics and self.is_free(indices):
            part = keras.ops.where(last, self.relaxation, 1.0)
            part = keras.ops.cast(part, rate.dtype)
            many_tensors.assign_sum(
                self, variables, anchors, gradients, -rate * part
            )
            return
        points = self.proximal_points(
            indices, many_tensors.each_sum(anchors, gradients, -rate)
        )
        if self.track_diagnostics:
            self._track(phase == 0, values, points)
        ends = updates.choose(
            last,
            lambda: self._relaxed(anchors, points),
            lambda: points,
        )
        many_tensors.assign_each(self, variables, ends)

    def _relaxed(self, anchors, points):
        if self.relaxation == 1.0:
            return points
        return many_tensors.each_between(anchors, points, self.relaxation)

    def _feasible_at_first(self, indices, values):
        """Anchors are feasible points, even if the initial weights are not."""
        operators = [self._operators[i] for i in indices]
        if not any(isinstance(o, ConvexSet) for o in operators):
            return values
        return updates.choose(
            keras.ops.convert_to_tensor(self.iterations) == 0,
            lambda: [
                o.project(v) if isinstance(o, ConvexSet) else v
                for o, v in zip(operators, values)
            ],
            lambda: values,
            often=False,
        )

    def _track(self, first, values, points):
        ops = keras.ops
        norms = many_tensors.each_norm(
            many_tensors.each_sum(points, values, -1.0)
        )
        length = ops.cast(ops.sqrt(ops.sum(ops.square(norms))), "float32")
        rate = ops.cast(self._step_size.value, "float32")
        before = self._length.value
        safe = ops.where(before > 0, before, ops.ones_like(before))
        keep = ops.logical_or(first, before <= 0)
        old = self._contraction.value
        self._contraction.assign(ops.where(keep, old, length / safe))
        old = self._residual.value
        self._residual.assign(ops.where(first, length / rate, old))
        self._length.assign(length)

    def diagnostics(self) -> dict[str, float]:
        r"""Dict of floats, of the last cycle; reads from the device.

        `contraction`: $\|w_{t+1} - w_t\| / \|w_t - w_{t-1}\|$, an estimate
        of $\gamma L$ from below; a warning is given if it is 1 or more.
        `residual`: $\|z - w_1\| / \gamma$ at the anchor, 0 at a solution.

        Raises:
            ValueError: Without `track_diagnostics=True`, or before training.
        """
        if not (self.track_diagnostics and self.built):
            raise ValueError(
                "Diagnostics exist only for a RAPP(track_diagnostics=True) "
                "that has trained. Received: "
                f"track_diagnostics={self.track_diagnostics}"
            )
        figures = {
            "contraction": float(tracing.read(self._contraction)),
            "residual": float(tracing.read(self._residual)),
        }
        if figures["contraction"] >= 1.0:
            warnings.warn(
                "The inner steps of RAPP do not contract: the learning rate "
                "times the Lipschitz constant is at least "
                f"{figures['contraction']:.3g}. Choose a learning rate that "
                "makes it 0.7 to 0.9",
                stacklevel=2,
            )
        return figures

    def begin_again(self) -> None:
        super().begin_again()
        for variable, operator in zip(self._known(), self._operators):
            if isinstance(operator, ConvexSet):
                variable.assign(operator.project(tracing.snapshot(variable)))

    def evaluation_values(self) -> list[Tensor | None]:
        if not self.built or self.at_rest():
            return [None] * len(self._known())
        return [None if a is None else a.value for a in self._anchors]

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: also `diagnostics()`, if they are tracked."""
        more = self.diagnostics() if self.track_diagnostics else {}
        return {**super().stability_metrics(), **more}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "inner_steps": self.inner_steps,
                "relaxation": self.relaxation,
                "track_diagnostics": self.track_diagnostics,
            }
        )
        return config
