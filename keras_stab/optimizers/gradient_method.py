"""GradientMethod: a wrapper that chooses the gradient."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.optimizers.wrapper import Wrapper


class GradientMethod(Wrapper):
    """A wrapper that chooses the gradient: it asks the oracle.

    A subclass defines `estimate(oracle)` and leaves a note there,
    `oracle.notes[self] = ...`, which it finds as `self.handed_over` when its
    gradients come back through `apply`.
    """

    handed_over = None

    @property
    def wants_oracle(self) -> bool:
        return True

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        grads = list(grads)
        # A model without trainable weights hands over nothing at all.
        if grads and self.wants_oracle and self.handed_over is None:
            raise RuntimeError(
                f"{type(self).__name__} received plain gradients, but it "
                "takes its own from the model and the batch. Train with "
                "`model.fit` or `model.train_on_batch`. If the model has a "
                "`train_step` that takes gradients itself (GradientTape, "
                "`backward`), move its loss into "
                "`compute_loss(self, x, y, y_pred, sample_weight, training)` "
                "and delete it, or let it end in "
                "`return super().train_step(data)`. For several networks with "
                "an optimizer each use `keras_stab.Game`"
                + self.plain_gradient_hint
            )
        super().apply(grads, trainable_variables)

    plain_gradient_hint = ""
