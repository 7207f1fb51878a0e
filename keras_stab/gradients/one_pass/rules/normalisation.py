"""Scale and offset of normalisation over the features of a row."""

import keras

from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.gradients.one_pass.rules.sums import sums_along_axes
from keras_stab.numerics.norms import in_full_precision


def _normalisation_rule(scale_name, offset_name=None):
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


register_layer_rule(keras.layers.LayerNormalization)(
    _normalisation_rule("gamma", "beta")
)
register_layer_rule(keras.layers.GroupNormalization)(
    _normalisation_rule("gamma", "beta")
)
register_layer_rule(keras.layers.RMSNormalization)(_normalisation_rule("scale"))
