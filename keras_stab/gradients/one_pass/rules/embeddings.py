"""Embeddings: tables that are looked up, and multiplied by."""

import math

import keras

from keras_stab.backend import products
from keras_stab.gradients.one_pass.contributions import Product
from keras_stab.gradients.one_pass.contributions import Scattered
from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.numerics.norms import in_full_precision


@register_layer_rule(keras.layers.Embedding)
def embedding_rule(layer, call):
    """The rows that are looked up, or the factors of a low-rank adapter."""
    lookup = _scattered(layer.input_dim, call, call.grouped(call.args[0]))
    if not layer.lora_enabled:
        return [(layer.embeddings, lookup)]
    a, b = (
        in_full_precision(call.value(v))
        for v in (layer.lora_embeddings_a, layer.lora_embeddings_b)
    )
    ids, rows = lookup.ids, lookup.rows * (layer.lora_alpha / layer.lora_rank)
    back = keras.ops.matmul(rows, keras.ops.transpose(b))
    middle = keras.ops.take(a, ids, axis=0)
    by_a = Scattered(ids, back, layer.input_dim, lookup.tokens)
    by_b = Product(middle[None], rows[None], tokens=lookup.tokens)
    return [(layer.lora_embeddings_a, by_a), (layer.lora_embeddings_b, by_b)]


def _scattered(size, call, ids):
    """The `Scattered` of a lookup in a table of that size."""
    gradient = call.grouped(call.gradient)
    width = gradient.shape[-1]
    tokens = call.tokens(math.prod(call.gradient.shape[1:-1]))
    ids = keras.ops.cast(products.reshape(ids, (call.groups, -1)), "int32")
    rows = products.reshape(gradient, (call.groups, -1, width))
    return Scattered(*products.as_looked_up(ids, rows, size), size, tokens)


@register_layer_rule(keras.layers.ReversibleEmbedding)
def reversible_embedding_rule(layer, call):
    """A table, or the product with it: the two uses are joined later."""
    reverse = call.kwargs.get("reverse", False)
    if layer.lora_enabled and reverse:
        return []
    if not reverse:
        answer = embedding_rule(layer, call)
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
    """Rows of the table: in order, the same for all samples, or as given."""
    table = layer.position_embeddings
    start = call.kwargs.get("start_index", 0)
    positions = call.kwargs.get("positions")
    if positions is not None:
        shape = keras.ops.shape(call.gradient)[:-1]
        ids = call.grouped(keras.ops.broadcast_to(positions, shape))
        return [(table, _scattered(table.shape[0], call, ids))]
    if not isinstance(start, int):
        return []
    gradient = in_full_precision(call.grouped(call.gradient))
    rows = tuple(range(1, len(gradient.shape) - 2))
    total = products.sum_over(gradient, rows)
    after = table.shape[0] - start - total.shape[1]
    total = keras.ops.pad(total, [[0, 0], [start, after], [0, 0]])
    return [(table, total)]
