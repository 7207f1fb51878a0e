"""The rules for the layers of Keras and KerasHub; importing registers them."""

from keras_stab.gradients.rules import convolutions
from keras_stab.gradients.rules import matrices
from keras_stab.gradients.rules import normalisation
from keras_stab.gradients.rules import tables

__all__ = ["convolutions", "matrices", "normalisation", "tables"]
