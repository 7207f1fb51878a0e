"""Dense and EinsumDense, with and without low-rank adapters."""

import math

import keras

from keras_stab.backend import products
from keras_stab.gradients.one_pass.contributions import Product
from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.gradients.one_pass.rules.einsum_factors import einsum_lora
from keras_stab.gradients.one_pass.rules.einsum_factors import einsum_product
from keras_stab.gradients.one_pass.rules.einsum_factors import expand_ellipsis
from keras_stab.gradients.one_pass.rules.sums import bias_gradients
from keras_stab.gradients.one_pass.rules.sums import is_added_along_its_axis


@register_layer_rule(keras.layers.Dense, before_activation=True)
def dense_rule(layer, call):
    """Tokens are rows times every axis between the first and the last."""
    positions = math.prod(call.gradient.shape[1:-1])
    inputs, gradient = call.grouped(call.args[0]), call.grouped(call.gradient)
    answer = []
    if layer.bias is not None:
        answer.append((layer.bias, bias_gradients(layer.bias, gradient)))

    def product(left, right):
        left, right = (
            products.reshape(t, (1, call.groups, -1, t.shape[-1]))
            for t in (left, right)
        )
        return Product(left, right, tokens=call.tokens(positions))

    if not layer.lora_enabled:
        answer.append((layer.kernel, product(inputs, gradient)))
        return answer
    a, b = _lora_factors(layer, call, inputs)
    middle = keras.ops.matmul(inputs, a)
    back = keras.ops.matmul(gradient, keras.ops.transpose(b))
    scale = layer.lora_alpha / layer.lora_rank
    answer.append((layer.lora_kernel_a, product(inputs, back * scale)))
    answer.append((layer.lora_kernel_b, product(middle * scale, gradient)))
    return answer


@register_layer_rule(keras.layers.EinsumDense, before_activation=True)
def einsum_dense_rule(layer, call):
    """Also serves MultiHeadAttention, which has no weights of its own."""
    inputs, gradient = call.grouped(call.args[0]), call.grouped(call.gradient)
    equation = expand_ellipsis(layer.equation, len(inputs.shape) - 1)
    answer = []
    if layer.bias is not None:
        if not is_added_along_its_axis(layer.bias.shape, call.gradient.shape):
            return []
        answer.append((layer.bias, bias_gradients(layer.bias, gradient)))
    if not layer.lora_enabled:
        product = einsum_product(
            equation, layer.kernel.shape, inputs, gradient, call.tokens
        )
        if product is not None:
            answer.append((layer.kernel, product))
        return answer
    a, b = _lora_factors(layer, call, inputs)
    scale = layer.lora_alpha / layer.lora_rank
    factors = einsum_lora(equation, a * scale, b, inputs, gradient, call.tokens)
    if factors is not None:
        # The scale came in with `a`; the gradient of `a` itself needs it too.
        by_a, by_b = factors
        by_a = Product(by_a.left, by_a.right * scale, by_a.fold, by_a.tokens)
        answer.append((layer.lora_kernel_a, by_a))
        answer.append((layer.lora_kernel_b, by_b))
    return answer


def _lora_factors(layer, call, like):
    return (
        keras.ops.cast(call.value(v), like.dtype)
        for v in (layer.lora_kernel_a, layer.lora_kernel_b)
    )
