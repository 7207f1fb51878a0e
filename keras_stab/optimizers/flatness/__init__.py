"""Methods that look for flat minima: SAM and IRE."""

from keras_stab.optimizers.flatness.ire import IRE
from keras_stab.optimizers.flatness.sam import SAM

__all__ = [
    "IRE",
    "SAM",
]


def __dir__():
    return __all__
