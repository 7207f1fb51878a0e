"""OptimisticGradient: twice the update, minus the one before."""

from collections.abc import Callable
from typing import Any

import keras

from keras_stab.arguments import checked_choice
from keras_stab.backend import look_ahead
from keras_stab.backend import many_tensors
from keras_stab.backend import updates
from keras_stab.optimizers.interpolation.measured_update import MeasuredUpdate
from keras_stab.registration import registered
from keras_stab.types import Tensor


@registered
class OptimisticGradient(MeasuredUpdate):
    r"""Optimistic gradient steps around any optimizer.

    With $u_t$ the update that the inner optimizer makes from the gradient and
    $P$ the constraints,

    $$
    z \leftarrow P(z + 2 u_t - u_{t-1})
    $$

    With SGD inside it is OGDA, with Adam optimistic Adam.

    Args:
        inner_optimizer: Keras optimizer, name or config; no method that
            takes several gradients per step. Defaults to `"sgd"`.
        initial_update: $u_{-1}$: `"repeat"` for $u_0$, so that the first
            step is a plain one, or `"zero"`. Defaults to `"repeat"`.
        name: String or `None`.

    Raises:
        ValueError: If an argument is unknown, or the inner optimizer averages
            weights.

    Example: the game $x y$.

    >>> import keras, keras_stab
    >>> x, y = keras.Variable(1.0), keras.Variable(0.5)
    >>> optimizer = keras_stab.OptimisticGradient(keras.optimizers.SGD(0.5))
    >>> for _ in range(200):
    ...     gradients = [y + 0.0, -(x + 0.0)]
    ...     optimizer.apply(gradients, [x, y])
    >>> abs(float(x)) < 1e-3, abs(float(y)) < 1e-3
    (True, True)

    Departures from the paper:
        Optimistic Adam is built on plain Adam; other libraries take
        Nesterov's.

    Cost: no extra gradient; one more copy of the weights, on PyTorch two.

    References:
        - Daskalakis, Ilyas, Syrgkanis, Zeng, 2018, "Training GANs with
          Optimism", arXiv:1711.00141
        - Gidel, Berard, Vignoud, Vincent, Lacoste-Julien, 2019, "A
          Variational Inequality Perspective on Generative Adversarial
          Networks", arXiv:1802.10551
    """

    slot_name = "last_update"
    evaluations_per_step = 1

    def __init__(
        self,
        inner_optimizer: str | dict | keras.optimizers.Optimizer = "sgd",
        initial_update: str = "repeat",
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self.initial_update = checked_choice(
            "initial_update", initial_update, ("repeat", "zero")
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
        def changes():
            return many_tensors.each_sum(after, before, -1.0)

        def optimistic():
            ahead = many_tensors.each_sum(changes(), slots, -1.0)
            return project(many_tensors.each_sum(after, ahead))

        looks_ahead = updated
        if self.initial_update == "repeat":
            looks_ahead = keras.ops.logical_and(updated, phase > 0)
        values = updates.choose(looks_ahead, optimistic, lambda: project(after))
        last = updates.choose(updated, changes, lambda: slots)
        return last, values

    def _step_freely(self, variables, before, slots, first):
        repeats = self.initial_update == "repeat"
        look_ahead.step_optimistically(
            variables, before, slots, first if repeats else None
        )

    def begin_again(self) -> None:
        super().begin_again()
        for slot in self._slots:
            if slot is not None:
                slot.assign(keras.ops.zeros(slot.shape, slot.dtype))

    def evaluation_values(self) -> list[Tensor | None]:
        return [None] * len(self._slots) if self.built else []

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["initial_update"] = self.initial_update
        return config
