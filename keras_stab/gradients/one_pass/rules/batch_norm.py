"""Batch-norm: scale and offset, and its forward pass group by group."""

import math

import keras

from keras_stab.backend import normalisation
from keras_stab.backend import products
from keras_stab.gradients.one_pass.layer_rules import register_group_forward
from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.gradients.one_pass.rules.normalisation import normalisation_rule

# With moving statistics; by those of the batch it runs group by group, below.
register_layer_rule(keras.layers.BatchNormalization)(
    normalisation_rule("gamma", "beta")
)


@register_group_forward(keras.layers.BatchNormalization)
def batch_norm_by_group(layer, call, inputs, training=None, mask=None):
    """`BatchNormalization.call` with moments, and a state, for each group."""
    rank = len(inputs.shape)
    axis = layer.axis % rank
    variables = layer.moving_mean, layer.moving_variance
    by_batch = training and layer.trainable
    dtype = keras.backend.result_type(inputs.dtype, "float32")
    before = [call.stored(v, dtype) for v in variables]
    if not by_batch and before[0] is None:
        return NotImplemented
    # Left to Keras: statistics of other kinds, and its error messages.
    if (
        layer.renorm
        or axis == 0
        or (mask is not None and len(mask.shape) != rank - 1)
    ):
        return NotImplemented
    shape = tuple(inputs.shape[1:])
    channels, after = shape[axis - 1], math.prod(shape[axis:])

    def blocks(tensor):
        """From `(B, ...)` to `(K, n, C, p)`."""
        tensor = call.grouped(tensor)
        return products.reshape(tensor, (call.groups, -1, channels, after))

    x = blocks(keras.ops.cast(inputs, dtype))
    weights = [
        None if v is None else call.weight(v, dtype)
        for v in (layer.gamma, layer.beta)
    ]
    if not by_batch:
        mean, variance = (m[:, None, :, None] for m in before)
        x = normalisation.rescaled(x - mean, variance, *weights, layer.epsilon)
    else:
        counted = (
            call.members(x) if mask is None else blocks(_elements(mask, inputs))
        )
        if counted is None:
            x, *moments = normalisation.normalise_groups(
                x, *weights, layer.epsilon
            )
        else:
            x, *moments = normalisation.normalise_some(
                x,
                counted,
                0.0 if mask is None else keras.config.epsilon(),
                *weights,
                layer.epsilon,
            )
        for variable, old, new in zip(variables, before, moments):
            old = keras.ops.cast(variable, dtype) if old is None else old
            call.store(
                variable, old * layer.momentum + new * (1.0 - layer.momentum)
            )
    x = products.reshape(x, (call.groups, -1, *shape))
    return keras.ops.cast(call.ungrouped(x), layer.compute_dtype)


def _elements(mask, inputs):
    mask = keras.ops.cast(keras.ops.expand_dims(mask, -1), "bool")
    return keras.ops.broadcast_to(mask, keras.ops.shape(inputs))
