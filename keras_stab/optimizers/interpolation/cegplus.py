"""CEGPlus: constrained extragradient with a damped second step."""

import warnings
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.backend import devices
from keras_stab.backend import many_tensors
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.constraints import ConvexSet
from keras_stab.numerics.half_space import step_to_half_space
from keras_stab.optimizers.interpolation.phase_optimizer import PhaseOptimizer
from keras_stab.optimizers.state import add_state
from keras_stab.registration import registered
from keras_stab.types import LearningRate
from keras_stab.types import Tensor


@registered
class CEGPlus(PhaseOptimizer):
    r"""Extragradient for constrained problems, with a smaller second step.

    With $H = \mathrm{id} - \gamma F$, $F$ the field of all players,

    $$
    \bar z = \mathrm{prox}_{\gamma}(H z), \qquad
    z \leftarrow z + \alpha (H \bar z - H z)
    $$

    Without constraints the second line is $z - \alpha \gamma F(\bar z)$, EG+;
    with $\alpha = 1$ it is extragradient, with constraints
    forward-backward-forward. $z$ itself is not projected and may be
    infeasible: `fit` evaluates, and ends, with its projection, and so does
    `swap_weights`.

    With `alpha="adaptive"`, $\delta$ the Minty constant and $\theta$ the
    relaxation, a step measures how long it may be:

    $$
    \alpha = \frac{\delta}{\gamma} + \frac{\langle \bar z - z,
    H \bar z - H z \rangle}{\|H \bar z - H z\|^2}, \qquad
    z \leftarrow z + \theta \alpha (H \bar z - H z)
    $$

    That is the relaxed projection on a half-space that holds the solution.
    The inner products are over the weights of all players together.

    Args:
        learning_rate: $\gamma$: float, schedule or callable, at most $1/L$;
            a step keeps the rate of its first gradient. Defaults to 0.1.
        alpha: Float in (0, 1], $\alpha$, or `"adaptive"`. Defaults to 0.5.
        proximal: As in `RAPP`. Defaults to `None`.
        minty_constant: Float, $\delta$, above $-\gamma/2$, also where a
            schedule ends, and at most $\rho$ (see below): 0 for a monotone
            game, below it for others. Only with `alpha="adaptive"`. Defaults
            to 0.0.
        relaxation: Float in (0, 2), $\theta$. Only with
            `alpha="adaptive"`. Defaults to 1.0.
        name: String or `None`.
        **kwargs: As in `RAPP`, `evaluate_with` among them.

    Raises:
        ValueError: If an argument is out of range, for `weight_decay`,
            `use_ema` and constraints that are not convex; for
            `alpha="adaptive"` on several replicas or in the optimizer of one
            player among several.

    Example: the game $(x - 0.9)(y - 0.9)$ in the box of -1 to 1.

    >>> import keras, keras_stab
    >>> box = keras_stab.constraints.Box(-1.0, 1.0)
    >>> x, y = keras.Variable(0.0), keras.Variable(0.0)
    >>> optimizer = keras_stab.CEGPlus(0.8, alpha=0.5, proximal=box)
    >>> for _ in range(60):
    ...     gradients = [y - 0.9, 0.9 - x]
    ...     optimizer.apply(gradients, [x, y])
    >>> abs(float(x) - 0.9) < 0.1, abs(float(y) - 0.9) < 0.1
    (True, True)

    Departures from the paper:
        None in the rules. The choice of $\gamma$ by a line search
        (CurvatureEG+) is not offered: it evaluates the field of one batch
        several times, a number not known in advance, while an optimizer is
        given one gradient of a new batch per call.

    Cost: two gradients per step, each from its own batch; two more copies
        of the weights. Adaptive: two more inner products.

    Convergence: weak Minty solutions with constant $\rho > -1/(2L)$, that
        is $\langle v, z - z^* \rangle \ge \rho \|v\|^2$ for all values v of
        the field with the constraints, $\gamma L \le 1$, and
        $\alpha < 1 + 2 \rho / \gamma$ or, adaptive,
        $-\gamma / 2 < \delta \le \rho$. Then $\alpha \ge 1/2 +
        \delta / \gamma$, and each step brings $\|z - z^*\|^2$ down by
        $\theta (2 - \theta) \alpha^2 \|H \bar z - H z\|^2$ or more. The
        proofs are of exact gradients. With noise that differs between the two
        batches of a step the adaptive $\alpha$ becomes small.

    References:
        - Pethick, Latafat, Patrinos, Fercoq, Cevher, 2022, "Escaping limit
          cycles: Global convergence for constrained nonconvex-nonconcave
          minimax problems", arXiv:2302.09831
    """

    evaluations_per_step = 2

    def __init__(
        self,
        learning_rate: LearningRate = 0.1,
        alpha: float | str = 0.5,
        proximal: Callable | dict[str, Callable] | None = None,
        minty_constant: float = 0.0,
        relaxation: float = 1.0,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(learning_rate, proximal, 2, name, **kwargs)
        self.is_adaptive = isinstance(alpha, str) and alpha == "adaptive"
        self.minty_constant = checked_number("minty_constant", minty_constant)
        self.relaxation = checked_number(
            "relaxation", relaxation, above=0.0, below=2.0
        )
        if self.is_adaptive:
            self.alpha = alpha
            self._warn_of_small_rates(learning_rate)
            return
        if isinstance(alpha, str):
            raise ValueError(
                f'`alpha` must be in (0, 1] or "adaptive". Received: {alpha=}'
            )
        self.alpha = checked_fraction("alpha", alpha)
        if (self.minty_constant, self.relaxation) != (0.0, 1.0):
            raise ValueError(
                "`minty_constant` and `relaxation` belong to "
                f'alpha="adaptive". Received: {alpha=}, {minty_constant=}, '
                f"{relaxation=}"
            )

    def _warn_of_small_rates(self, rate):
        # A schedule or callable has no number to check. Not an error: a saved
        # configuration may hold a rate that has decayed in training.
        is_number = isinstance(rate, (int, float))
        if is_number and self.minty_constant <= -rate / 2 < 0:
            warnings.warn(
                "`minty_constant` is not above -learning_rate / 2, so that "
                "steps may turn back: raise one of them. Received: "
                f"minty_constant={self.minty_constant}, learning_rate={rate}",
                stacklevel=3,
            )

    @property
    def moves_jointly(self) -> bool:
        """Whether a step depends on all weights of the model at once."""
        return self.is_adaptive

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self._iterates, self._forward = self.add_optimizer_variables(
            variables, ["iterate", "forward"]
        )
        self._last_alpha = []
        if self.is_adaptive:
            if devices.replicas() > 1:
                raise ValueError(
                    '`alpha="adaptive"` needs the weights of the whole model '
                    "at once, which tf.distribute does not give: choose a "
                    f"number. Received: {devices.replicas()} replicas"
                )
            self._last_alpha = [
                add_state(self, "alpha", dtype=self._step_size.dtype)
            ]

    def move(
        self,
        indices: list[int],
        gradients: list[Any],
        values: list[Tensor],
        variables: list[keras.Variable],
    ) -> None:
        iterates = [self._iterates[i] for i in indices]
        forward = [self._forward[i] for i in indices]
        points = many_tensors.each_sum(
            values, gradients, -self._step_size.value
        )

        def extrapolated():
            ahead = self.proximal_points(indices, points)
            last = map(tracing.read, self._last_alpha)
            return [*values, *points, *ahead, *last]

        def updated():
            old, before = map(many_tensors.each_value, (iterates, forward))
            change = many_tensors.each_sum(points, before, -1.0)
            factor, last = self.alpha, []
            if self.is_adaptive:
                last = [
                    self._adapted(
                        many_tensors.each_sum(values, old, -1.0), change
                    )
                ]
                factor = last[0] * self.relaxation
            return [
                *old,
                *before,
                *many_tensors.each_sum(old, change, factor),
                *last,
            ]

        ends = updates.choose(self.phase() == 0, extrapolated, updated)
        targets = [*iterates, *forward, *variables, *self._last_alpha]
        many_tensors.assign_each(self, targets, ends)

    def _adapted(self, ahead, change):
        """The step to the half-space, from the two differences."""
        rate, delta = self._step_size.value, self.minty_constant
        inner, square = (
            keras.ops.cast(many_tensors.inner_product(a, change), rate.dtype)
            for a in (ahead, change)
        )
        # A schedule may start at a rate of 0.
        offset = delta / rate if delta else 0.0
        return step_to_half_space(inner, square, offset)

    def diagnostics(self) -> dict[str, float]:
        """Dict of one float, `alpha` of the last step; reads from the device.

        A warning is given if it is 0 or less: then the learning rate is too
        large, or the Minty constant too small for it.

        Raises:
            ValueError: Without `alpha="adaptive"`, or before training.
        """
        if not (self.is_adaptive and self.built):
            raise ValueError(
                'Diagnostics exist only for a CEGPlus(alpha="adaptive") that '
                f"has trained. Received: alpha={self.alpha!r}"
            )
        alpha = float(tracing.read(self._last_alpha[0]))
        if alpha <= 0.0 and self.updates >= 2:
            warnings.warn(
                "The last step of CEGPlus did not go forward. Unless the "
                "weights are a solution, choose a smaller learning rate, or a "
                "`minty_constant` above -learning_rate / 2. Received: "
                f"{alpha=:.3g}",
                stacklevel=2,
            )
        return {"alpha": alpha}

    def stability_metrics(self) -> dict[str, Any]:
        """For `StabilityMonitor`: also `diagnostics()`, where adaptive."""
        more = self.diagnostics() if self.is_adaptive else {}
        return {**super().stability_metrics(), **more}

    def evaluation_values(self) -> list[Tensor | None]:
        if not self.built:
            return []
        at_rest = self.at_rest()
        return self.feasible(
            [
                None if slot is None else tracing.read(v if at_rest else slot)
                for v, slot in zip(self._known(), self._iterates)
            ]
        )

    def feasible(self, values: list[Tensor]) -> list[Tensor]:
        """The projections of values of the variables on their sets."""
        return [
            operator.project(value)
            if isinstance(operator, ConvexSet) and value is not None
            else value
            for operator, value in zip(self._operators, values)
        ]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "alpha": self.alpha,
                "minty_constant": self.minty_constant,
                "relaxation": self.relaxation,
            }
        )
        return config
