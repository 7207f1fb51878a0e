"""Embeddings: tables that are looked up, and multiplied by."""

import math

import keras

from keras_stab.backend import products
from keras_stab.gradients.one_pass.contributions import Product
from keras_stab.gradients.one_pass.contributions import Scattered
from keras_stab.gradients.one_pass.layer_rules import register_layer_rule


@register_layer_rule(keras.layers.Embedding)
def embedding_rule(layer, call):
    ids = call.grouped(call.args[0])
    gradient = call.grouped(call.gradient)
    return _lookup(layer, call, ids, gradient)


def _lookup(layer, call, ids, gradient):
    width = gradient.shape[-1]
    positions = math.prod(call.args[0].shape[1:])
    tokens = call.tokens(positions)
    ids = keras.ops.cast(products.reshape(ids, (call.groups, -1)), "int32")
    rows = products.reshape(gradient, (call.groups, -1, width))
    if not layer.lora_enabled:
        table = layer.embeddings
        return [(table, Scattered(ids, rows, layer.input_dim, tokens))]
    a, b = (
        keras.ops.cast(call.value(v), "float32")
        for v in (layer.lora_embeddings_a, layer.lora_embeddings_b)
    )
    scale = layer.lora_alpha / layer.lora_rank
    rows = products.to_float32(rows) * scale
    back = keras.ops.matmul(rows, keras.ops.transpose(b))
    middle = keras.ops.take(a, ids, axis=0)
    by_a = Scattered(ids, back, layer.input_dim, tokens)
    by_b = Product(middle[None], rows[None], tokens=tokens)
    return [(layer.lora_embeddings_a, by_a), (layer.lora_embeddings_b, by_b)]


@register_layer_rule(keras.layers.ReversibleEmbedding)
def reversible_embedding_rule(layer, call):
    """A table, or the product with it: the two uses are joined later."""
    reverse = call.kwargs.get("reverse", False) or len(call.args) > 1
    if layer.lora_enabled and reverse:
        return []
    if not reverse:
        answer = _lookup(
            layer, call, call.grouped(call.args[0]), call.grouped(call.gradient)
        )
        if not layer.tie_weights:
            answer.append((layer.reverse_embeddings, None))
        return answer
    gradient = call.gradient
    if layer.logit_soft_cap is not None:
        ratio = call.outputs[0] / layer.logit_soft_cap
        gradient = gradient * (1.0 - keras.ops.square(ratio))
    positions = math.prod(gradient.shape[1:-1])
    hidden, logits = (
        products.reshape(call.grouped(t), (1, call.groups, -1, t.shape[-1]))
        for t in (call.args[0], gradient)
    )
    tokens = call.tokens(positions)
    if layer.tie_weights:
        return [(layer.embeddings, Product(logits, hidden, tokens=tokens))]
    product = Product(hidden, logits, tokens=tokens)
    return [(layer.embeddings, None), (layer.reverse_embeddings, product)]


@register_layer_rule("keras_hub>PositionEmbedding")
def position_embedding_rule(layer, call):
    """The first rows of the table, the same for all samples."""
    start = call.kwargs.get("start_index", 0)
    if len(call.args) > 1 or not isinstance(start, int):
        return []
    gradient = keras.ops.cast(call.grouped(call.gradient), "float32")
    rows = tuple(range(1, len(gradient.shape) - 2))
    total = products.sum_over(gradient, rows)
    table = layer.position_embeddings
    after = table.shape[0] - start - total.shape[1]
    total = keras.ops.pad(total, [[0, 0], [start, after], [0, 0]])
    return [(table, total)]
