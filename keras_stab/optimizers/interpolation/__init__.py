"""Methods that interpolate between iterates; the extragradient family."""

from keras_stab.optimizers.interpolation.cegplus import CEGPlus
from keras_stab.optimizers.interpolation.extragradient import ExtraGradient
from keras_stab.optimizers.interpolation.lookahead import Lookahead
from keras_stab.optimizers.interpolation.optimistic_gradient import (
    OptimisticGradient,
)
from keras_stab.optimizers.interpolation.past_extragradient import (
    PastExtraGradient,
)
from keras_stab.optimizers.interpolation.rapp import RAPP

__all__ = [
    "CEGPlus",
    "ExtraGradient",
    "Lookahead",
    "OptimisticGradient",
    "PastExtraGradient",
    "RAPP",
]


def __dir__():
    return __all__
