"""Types that more than one module uses in annotations."""

from collections.abc import Callable
from typing import Any
from typing import TypeAlias

import keras

# A tensor of the backend: `tf.Tensor`, `jax.Array` or `torch.Tensor`.
Tensor: TypeAlias = keras.KerasTensor | Any

LearningRate: TypeAlias = (
    float
    | keras.optimizers.schedules.LearningRateSchedule
    | Callable[[], float]
)
