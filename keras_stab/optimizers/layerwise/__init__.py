"""Methods with a learning rate per layer: LARS, TVLARS and LAMB."""

from keras_stab.optimizers.layerwise.lamb import LAMB
from keras_stab.optimizers.layerwise.lars import LARS
from keras_stab.optimizers.layerwise.tvlars import TVLARS

__all__ = [
    "LAMB",
    "LARS",
    "TVLARS",
]


def __dir__():
    return __all__
