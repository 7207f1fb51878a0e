"""What the loss looks like around the weights: sharpness and landscapes."""

from keras_stab.diagnostics.loss.curvature import sharpness
from keras_stab.diagnostics.loss.landscape import loss_landscape
from keras_stab.diagnostics.loss.landscape import plot_loss_landscape

__all__ = [
    "loss_landscape",
    "plot_loss_landscape",
    "sharpness",
]


def __dir__():
    return __all__
