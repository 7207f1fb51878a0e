"""ExtraGradient: looks ahead, then steps from where it stood."""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_fraction
from keras_stab.backend import many_tensors
from keras_stab.backend import updates
from keras_stab.optimizers.interpolation.measured_update import MeasuredUpdate
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.wrapper import innermost
from keras_stab.registration import registered
from keras_stab.types import Tensor


@registered
class ExtraGradient(MeasuredUpdate):
    r"""Extragradient around any optimizer; ExtraAdam with Adam inside.

    With $u$ the update that the inner optimizer makes from a gradient, $P$ the
    constraints and $s$ the update scale, two calls of `apply` make a step:

    $$
    \bar z = P(z + u(F(z))), \qquad z \leftarrow P(z + s \, u(F(\bar z)))
    $$

    Args:
        inner_optimizer: Keras optimizer, name or config; no method that
            takes several gradients per step. Defaults to `"sgd"`.
        update_scale: Float in (0, 1], $s$; below 1 it is EG+, which tolerates
            more nonmonotonicity. Defaults to 1.0.
        moments: `"shared"`: one inner optimizer for both calls (Gidel et
            al.). `"separate"`: extrapolation and update have moments and
            step count of their own. Defaults to `"shared"`.
        name: String or `None`.
        evaluate_with: `"evaluation"`: validation in `fit`, callbacks at the
            end of an epoch and the model after `fit` have the iterate.
            `"trained"`: the trained weights. Defaults to `"evaluation"`.

    Raises:
        ValueError: If an argument is out of range, if the inner optimizer
            averages weights, or if `moments="separate"` and the inner
            optimizer holds one optimizer per player.

    After the first of the two calls the model holds $\bar z$. `fit`
    evaluates, and ends, at $z$; elsewhere use
    `with optimizer.swap_weights(model):`.

    Example: the game $x y$.

    >>> import keras, keras_stab
    >>> x, y = keras.Variable(1.0), keras.Variable(0.5)
    >>> optimizer = keras_stab.ExtraGradient(keras.optimizers.SGD(0.5))
    >>> for _ in range(2):
    ...     gradients = [y + 0.0, -(x + 0.0)]
    ...     optimizer.apply(gradients, [x, y])
    >>> float(x), float(y)
    (0.5, 0.875)

    Departures from the paper:
        With constraints both points are projected; `CEGPlus` is the method
        that projects the first only, and the one with a guarantee there.

    Cost: two gradients per step, each from its own batch: compare methods
        by gradients. One more copy of the weights, and with separate moments
        one more of the inner state.

    References:
        - Gidel, Berard, Vignoud, Vincent, Lacoste-Julien, 2019, "A
          Variational Inequality Perspective on Generative Adversarial
          Networks", arXiv:1802.10551
        - Pethick, Latafat, Patrinos, Fercoq, Cevher, 2022, "Escaping limit
          cycles: Global convergence for constrained nonconvex-nonconcave
          minimax problems", arXiv:2302.09831
    """

    evaluations_per_step = 2

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "sgd",
        update_scale: float = 1.0,
        moments: str = "shared",
        name: str | None = None,
        evaluate_with: str = "evaluation",
        **kwargs: Any,
    ):
        super().__init__(
            inner_optimizer, name=name, evaluate_with=evaluate_with, **kwargs
        )
        self.update_scale = checked_fraction("update_scale", update_scale)
        self.moments = checked_choice(
            "moments", moments, ("shared", "separate")
        )
        self.extrapolation_optimizer = None
        self._updates = None
        if moments == "separate":
            inner = self.inner_optimizer
            if hasattr(innermost(inner), "optimizers"):
                raise ValueError(
                    'moments="separate" copies the inner optimizer, so if it '
                    "holds one per player, callbacks would change the rates of "
                    "the originals only. Give each player its own ExtraGradient"
                    '(..., moments="separate"). Received: inner_optimizer of '
                    f"type {type(innermost(inner)).__name__}"
                )
            if inner.built:
                raise ValueError(
                    'moments="separate" makes a second optimizer like the '
                    "inner one, which must not be built yet. Received: "
                    f"{inner.name!r}, which is built"
                )
            self.extrapolation_optimizer = type(inner).from_config(
                inner.get_config()
            )
            self.extrapolation_optimizer.loss_scale_factor = (
                inner.loss_scale_factor
            )

    def build(self, variables: Iterable[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        if self.extrapolation_optimizer is not None:
            self.extrapolation_optimizer.build(variables)
        super().build(variables)
        if self.extrapolation_optimizer is not None:
            self._updates = add_state(self, "updates")

    def inner_apply(
        self,
        gradients: list[Any],
        variables: list[keras.Variable],
        phase: Tensor,
    ) -> None:
        if self.extrapolation_optimizer is None:
            super().inner_apply(gradients, variables, phase)
            return
        pairs = (
            (phase == 0, self.extrapolation_optimizer),
            (phase == 1, self.inner_optimizer),
        )
        for condition, optimizer in pairs:
            updates.apply_gradients_if(
                condition, optimizer, lambda: gradients, variables
            )

    def move(
        self,
        phase: Tensor,
        updated: Tensor,
        slots: list[Tensor],
        before: list[Tensor],
        after: list[Tensor],
        project: Callable[[list[Tensor]], list[Tensor]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        anchors = updates.choose(
            phase == 0, lambda: list(before), lambda: slots
        )

        def from_anchor():
            change = many_tensors.each_sum(after, before, -1.0)
            return project(
                many_tensors.each_sum(anchors, change, self.update_scale)
            )

        extrapolates = keras.ops.logical_or(
            phase == 0, keras.ops.logical_not(updated)
        )
        values = updates.choose(
            extrapolates, lambda: project(after), from_anchor
        )
        return anchors, values

    def next_phase(self, phase: Tensor, updated: Tensor) -> Tensor:
        made = keras.ops.cast(updated, "int32")
        if self._updates is not None:
            self._updates.assign(self._updates + made)
        return (phase + made) % 2

    # ---- What reaches both optimizers -------------------------------------

    def _both(self):
        both = [self.extrapolation_optimizer, self.inner_optimizer]
        return [optimizer for optimizer in both if optimizer is not None]

    @property
    def variables(self) -> list[keras.Variable]:
        inside = [v for optimizer in self._both() for v in optimizer.variables]
        return self.own_variables + inside

    @property
    def iterations(self) -> keras.Variable:
        return super().iterations if self._updates is None else self._updates

    def completed_updates(self) -> Tensor:
        count = super().completed_updates()
        if self.extrapolation_optimizer is None:
            return count
        more = keras.ops.convert_to_tensor(
            self.extrapolation_optimizer.iterations
        )
        return count + keras.ops.cast(more, "int32")

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        for optimizer in self._both():
            optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self) -> Any:
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: Any) -> None:
        # The base class sets it before there is an inner optimizer.
        for name in ("inner_optimizer", "extrapolation_optimizer"):
            optimizer = vars(self).get(name)
            if optimizer is not None:
                optimizer.loss_scale_factor = factor

    def exclude_from_weight_decay(
        self, var_list: Any = None, var_names: Any = None
    ) -> None:
        for optimizer in self._both():
            optimizer.exclude_from_weight_decay(
                var_list=var_list, var_names=var_names
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {"update_scale": self.update_scale, "moments": self.moments}
        )
        return config
