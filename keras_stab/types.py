"""What annotations name more than once."""

from collections.abc import Callable
from typing import Any
from typing import TypeAlias

import keras

# Of the backend in use: a `tf.Tensor`, a `jax.Array` or a `torch.Tensor`.
Tensor: TypeAlias = keras.KerasTensor | Any

LearningRate: TypeAlias = (
    float
    | keras.optimizers.schedules.LearningRateSchedule
    | Callable[[], float]
)
