"""Methods that average weights."""

from keras_stab.optimizers.averaging.averaged_sgd import AveragedSGD
from keras_stab.optimizers.averaging.schedule_free import ScheduleFree
from keras_stab.optimizers.averaging.weight_averaging import WeightAveraging

__all__ = [
    "AveragedSGD",
    "ScheduleFree",
    "WeightAveraging",
]


def __dir__():
    return __all__
