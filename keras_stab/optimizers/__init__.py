"""The methods, one class per file and one folder per family."""

from keras_stab.optimizers.aggregate import Aggregate
from keras_stab.optimizers.averaging import AveragedSGD
from keras_stab.optimizers.averaging import ScheduleFree
from keras_stab.optimizers.averaging import WeightAveraging
from keras_stab.optimizers.clipping import AdaptiveClipping
from keras_stab.optimizers.flatness import IRE
from keras_stab.optimizers.flatness import SAM
from keras_stab.optimizers.grain import GRAIN
from keras_stab.optimizers.interpolation import RAPP
from keras_stab.optimizers.interpolation import CEGPlus
from keras_stab.optimizers.interpolation import ExtraGradient
from keras_stab.optimizers.interpolation import Lookahead
from keras_stab.optimizers.interpolation import OptimisticGradient
from keras_stab.optimizers.interpolation import PastExtraGradient
from keras_stab.optimizers.layerwise import LAMB
from keras_stab.optimizers.layerwise import LARS
from keras_stab.optimizers.layerwise import TVLARS

__all__ = [
    "AdaptiveClipping",
    "Aggregate",
    "AveragedSGD",
    "CEGPlus",
    "ExtraGradient",
    "GRAIN",
    "IRE",
    "LAMB",
    "LARS",
    "Lookahead",
    "OptimisticGradient",
    "PastExtraGradient",
    "RAPP",
    "SAM",
    "ScheduleFree",
    "TVLARS",
    "WeightAveraging",
]


def __dir__():
    return __all__
