"""PastExtraGradient: looks ahead with the gradient of the step before."""

from collections.abc import Callable

from keras_stab.backend import look_ahead
from keras_stab.backend import many_tensors
from keras_stab.backend import updates
from keras_stab.optimizers.interpolation.measured_update import MeasuredUpdate
from keras_stab.registration import registered
from keras_stab.types import Tensor


@registered
class PastExtraGradient(MeasuredUpdate):
    r"""Extragradient with one gradient per step (Popov's method).

    The model holds the extrapolated point $\bar z$, the optimizer the iterate
    $z$. With $u$ the update that the inner optimizer makes from $F(\bar z)$ and
    $P$ the constraints,

    $$
    z \leftarrow P(z + u), \qquad \bar z \leftarrow P(z + u)
    $$

    with the new $z$ in the second line and the same $u$.

    Args:
        inner_optimizer: Keras optimizer, name or config; no method that
            takes several gradients per step. Defaults to `"sgd"`.
        name: String or `None`.
        evaluate_with: `"evaluation"`: validation in `fit`, callbacks at the
            end of an epoch and the model after `fit` have the iterate.
            `"trained"`: the trained weights. Defaults to `"evaluation"`.

    Raises:
        ValueError: If the inner optimizer averages weights.

    `fit` evaluates, and ends, at $z$; elsewhere use `with
    optimizer.swap_weights(model):`. If other weights are put into the model,
    the next `fit` starts again from them, with a warning; `restart` does so by
    hand.

    Example: the game $x y$.

    >>> import keras, keras_stab
    >>> x, y = keras.Variable(1.0), keras.Variable(0.5)
    >>> optimizer = keras_stab.PastExtraGradient(keras.optimizers.SGD(0.5))
    >>> for _ in range(200):
    ...     gradients = [y + 0.0, -(x + 0.0)]
    ...     optimizer.apply(gradients, [x, y])
    >>> abs(float(x)) < 1e-3, abs(float(y)) < 1e-3
    (True, True)

    Departures from the paper:
        None; the published code uses Adam inside.

    Cost: no extra gradient; one more copy of the weights.

    References:
        - Gidel, Berard, Vignoud, Vincent, Lacoste-Julien, 2019, "A
          Variational Inequality Perspective on Generative Adversarial
          Networks", arXiv:1802.10551
    """

    slot_name = "iterate"
    evaluation_name = "iterate"
    evaluations_per_step = 1
    _pays_in_kernel = True

    def move(
        self,
        phase: Tensor,
        updated: Tensor,
        slots: list[Tensor],
        before: list[Tensor],
        after: list[Tensor],
        project: Callable[[list[Tensor]], list[Tensor]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        iterates = updates.choose(
            phase == 0, lambda: list(before), lambda: slots
        )

        def moved():
            change = many_tensors.each_sum(after, before, -1.0)
            new = project(many_tensors.each_sum(iterates, change))
            return [*new, *project(many_tensors.each_sum(new, change))]

        both = updates.choose(updated, moved, lambda: [*iterates, *after])
        return both[: len(slots)], both[len(slots) :]

    def _step_freely(self, variables, before, slots, first):
        look_ahead.step_past(variables, before, slots, first)
