"""UpdatesTogether: one update for all variables."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.backend import updates


class UpdatesTogether(keras.optimizers.Optimizer):
    """Base of optimizers that define `update_steps` for many variables.

    Keras calls `update_step` once per variable. On PyTorch its own optimizers
    override what is overridden here, and for the same reason: the time of many
    small operations is spent in Python.
    """

    # Whether that is faster on the other backends too.
    together_everywhere = False
    # Whether TensorFlow compiles it as one kernel, even in a step that is not
    # compiled: where the operations for each variable are many.
    compiled_by_itself = False

    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        # What a `Wrapper` does for the optimizer inside it; these are used
        # without one.
        super().apply(updates.barrier(list(grads)), trainable_variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        together = self.together_everywhere or self.compiled_by_itself
        if not devices.EAGER and not (together and devices.replicas() == 1):
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        with tracing.no_gradients():
            if self.compiled_by_itself:
                tracing.in_kernel(
                    lambda: self.update_steps(
                        grads, trainable_variables, learning_rate
                    ),
                    trainable_variables,
                )
            else:
                self.update_steps(grads, trainable_variables, learning_rate)
