"""CEGPlus: constrained extragradient with a damped second step."""

import keras

from keras_stab.constraints import ConvexSet
from keras_stab.gradients import autodiff
from keras_stab.optimizers.arguments import checked_number
from keras_stab.optimizers.phase_optimizer import PhaseOptimizer


@keras.saving.register_keras_serializable(package="keras_stab")
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
    infeasible: evaluate through `SwapSlowWeights` or `swap_weights`, which
    project it.

    Args:
        learning_rate: $\gamma$: float, schedule or callable, at most $1/L$;
            a step keeps the rate of its first gradient. Defaults to 0.1.
        alpha: Float in (0, 1], $\alpha$. Defaults to 0.5.
        proximal: As in `RAPP`. Defaults to `None`.
        name: String.
        **kwargs: As in `RAPP`.

    Raises:
        ValueError: If an argument is out of range, for `weight_decay`,
            `use_ema` and constraints that are not convex.

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
        None. The adaptive choices of $\alpha$ and $\gamma$ are not offered.

    Cost: two gradients a step, each of a batch of its own; two more copies
        of the weights.

    Convergence: weak Minty solutions with constant $\rho > -1/(2L)$,
        $\gamma L \le 1$ and $\alpha < 1 + 2 \rho / \gamma$.

    References:
        - Pethick, Latafat, Patrinos, Fercoq, Cevher, 2022, "Escaping limit
          cycles: Global convergence for constrained nonconvex-nonconcave
          minimax problems", arXiv:2302.09831
    """

    evaluations_per_step = 2

    def __init__(
        self,
        learning_rate=0.1,
        alpha=0.5,
        proximal=None,
        name="cegplus",
        **kwargs,
    ):
        super().__init__(learning_rate, proximal, 2, name, **kwargs)
        self.alpha = checked_number("alpha", alpha, 0.0, forbidden=(0.0,))
        if self.alpha > 1.0:
            raise ValueError(f"`alpha` must be in (0, 1]. Received: {alpha=}")

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._iterates, self._forward = self.add_optimizer_variables(
            variables, ["iterate", "forward"]
        )

    def move(self, indices, gradients, values, variables):
        iterates = [self._iterates[i] for i in indices]
        forward = [self._forward[i] for i in indices]
        points = autodiff.each_sum(values, gradients, -self._step_size.value)

        def extrapolated():
            ahead = self.proximal_points(indices, points)
            return [*values, *points, *ahead]

        def updated():
            old, before = map(autodiff.each_value, (iterates, forward))
            change = autodiff.each_sum(points, before, -1.0)
            return [
                *old,
                *before,
                *autodiff.each_sum(old, change, self.alpha),
            ]

        ends = autodiff.choose(self.phase() == 0, extrapolated, updated)
        count = len(variables)
        autodiff.assign_each(self, iterates, ends[:count])
        autodiff.assign_each(self, forward, ends[count : 2 * count])
        autodiff.assign_each(self, variables, ends[2 * count :])

    def evaluation_values(self):
        if not self.built:
            return []
        at_rest = self.at_rest()
        return self.feasible(
            [
                None if slot is None else autodiff.read(v if at_rest else slot)
                for v, slot in zip(self._known(), self._iterates)
            ]
        )

    def feasible(self, values):
        """The projections of values of the variables on their sets."""
        return [
            operator.project(value)
            if isinstance(operator, ConvexSet) and value is not None
            else value
            for operator, value in zip(self._operators, values)
        ]

    def get_config(self):
        config = super().get_config()
        config["alpha"] = self.alpha
        return config
