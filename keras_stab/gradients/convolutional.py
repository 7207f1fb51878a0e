"""Whether a model has convolutions, which compilers treat in other ways."""

import keras

from keras_stab import keras_internals

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def has_convolution(model):
    """Whether one of Keras's convolution layers is in the model."""
    return any(
        isinstance(layer, _CONVOLUTIONS)
        for layer in keras_internals.all_layers(model)
    )
