"""Scale and offset of normalisation over the features of a row."""

import math

import keras

from keras_stab.backend import devices
from keras_stab.backend import normalisation
from keras_stab.backend import products
from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.gradients.one_pass.rules.sums import sums_along_axes
from keras_stab.numerics.norms import in_full_precision


def normalisation_rule(scale_name, offset_name=None):
    def rule(layer, call):
        """The output without scale and offset, from the layer itself."""
        scale = getattr(layer, scale_name)
        offset = getattr(layer, offset_name) if offset_name else None
        answer = []
        if offset is not None:
            answer.append((offset, sums_along_axes(layer, call, call.gradient)))
        if scale is not None:
            plain = [(scale, keras.ops.ones_like(call.value(scale)))]
            if offset is not None:
                plain += [(offset, keras.ops.zeros_like(call.value(offset)))]
            (normalised,) = call.rerun(plain, call.args, call.kwargs)
            normalised = in_full_precision(normalised)
            product = normalised * in_full_precision(call.gradient)
            answer.append((scale, sums_along_axes(layer, call, product)))
        return answer

    return rule


_any_normalisation_rule = normalisation_rule("gamma", "beta")


@register_layer_rule(keras.layers.LayerNormalization)
def layer_normalisation_rule(layer, call):
    """On PyTorch one operation takes the place of the layer itself."""
    inputs = in_full_precision(call.args[0])
    rank = len(inputs.shape)
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    axes = sorted(axis % rank for axis in axes)
    last = axes == list(range(rank - len(axes), rank))
    if not devices.EAGER or layer.rms_scaling or not last:
        return _any_normalisation_rule(layer, call)
    shape = tuple(inputs.shape[axes[0] :])
    x, gradient = (
        products.reshape(call.grouped(t), (call.groups, -1, math.prod(shape)))
        for t in (inputs, in_full_precision(call.gradient))
    )
    stacks = []
    if layer.beta is not None:
        stacks.append((layer.beta, products.sum_over(gradient, 1)))
    if layer.gamma is not None:
        total = normalisation.gradient_of_scale(x, gradient, layer.epsilon)
        stacks.append((layer.gamma, total))
    return [
        (variable, products.reshape(stack, (call.groups, *shape)))
        for variable, stack in stacks
    ]


register_layer_rule(keras.layers.GroupNormalization)(_any_normalisation_rule)
register_layer_rule(keras.layers.RMSNormalization)(normalisation_rule("scale"))
