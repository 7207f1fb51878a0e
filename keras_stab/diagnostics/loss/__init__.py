"""What the loss looks like around the weights: sharpness and landscapes."""

from keras_stab.diagnostics.loss.curvature import sharpness
from keras_stab.diagnostics.loss.landscape import Landscape
from keras_stab.diagnostics.loss.landscape import loss_landscape
from keras_stab.diagnostics.loss.landscape import plot_loss_landscape
from keras_stab.diagnostics.loss.sharpness_figures import Sharpness

__all__ = [
    "Landscape",
    "Sharpness",
    "loss_landscape",
    "plot_loss_landscape",
    "sharpness",
]


def __dir__():
    return __all__
