"""Batch-norm: scale and offset, and its forward pass group by group."""

import keras

from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.gradients.one_pass.rules.sums import sums_along_axes
from keras_stab.numerics.norms import in_full_precision


@register_layer_rule(keras.layers.BatchNormalization)
def batch_norm_rule(layer, call):
    """With moving statistics; in training it mixes rows and is refused."""
    answer = []
    plain = []
    if layer.center:
        beta = sums_along_axes(layer, call, call.gradient)
        answer.append((layer.beta, beta))
        plain.append((layer.beta, keras.ops.zeros_like(call.value(layer.beta))))
    if layer.scale:
        plain.append(
            (layer.gamma, keras.ops.ones_like(call.value(layer.gamma)))
        )
        (normalised,) = call.rerun(plain, call.args, call.kwargs)
        product = in_full_precision(normalised) * in_full_precision(
            call.gradient
        )
        answer.append((layer.gamma, sums_along_axes(layer, call, product)))
    return answer
