"""The rules for the layers of Keras and KerasHub; importing registers them."""

from keras_stab.gradients.one_pass.rules import batch_norm
from keras_stab.gradients.one_pass.rules import convolutions
from keras_stab.gradients.one_pass.rules import embeddings
from keras_stab.gradients.one_pass.rules import matrices
from keras_stab.gradients.one_pass.rules import normalisation

__all__ = [
    "batch_norm",
    "convolutions",
    "embeddings",
    "matrices",
    "normalisation",
]
