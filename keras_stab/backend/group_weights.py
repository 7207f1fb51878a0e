"""Weighted sums over groups; what has weight 0 may hold NaN."""

import collections
import math

import keras

from keras_stab.backend.devices import BACKEND
from keras_stab.backend.products import reshape

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
    import jax.numpy as jnp
elif BACKEND == "torch":
    import torch

_GroupWeights = collections.namedtuple("_GroupWeights", ["each", "chosen"])


def group_weights(weights, like):
    """Weights of groups, as the functions below want them.

    PyTorch: on the device of a tensor, where they go once a step, with the
    indices of the groups whose weight is not 0, or `None` for all groups.
    They come from the host (`on_small_matrix`), so this reads nothing back.
    """
    if BACKEND != "torch" or isinstance(weights, _GroupWeights):
        return weights
    (chosen,) = weights.detach().cpu().numpy().nonzero()
    weights = weights.to(like.device)
    if len(chosen) == len(weights):
        return _GroupWeights(weights, None)
    return _GroupWeights(weights, torch.from_numpy(chosen).to(like.device))


def weighted_rows(weights, tensor):
    """Multiplies slices by weights; one of weight 0 may hold NaN."""
    if BACKEND == "torch":
        each, chosen = group_weights(weights, tensor)
        column = each.to(tensor.dtype).reshape(_column(tensor, 0))
        product = tensor * column
        if chosen is None:
            return product
        return torch.where(column != 0, product, 0.0)
    column = reshape(weights, _column(tensor, 0))
    product = tensor * keras.ops.cast(column, tensor.dtype)
    return keras.ops.where(
        column != 0, product, keras.ops.zeros((), tensor.dtype)
    )


def weighted_factors(weights, left, right):
    """Both factors of products of the groups, the second times the weights.

    A group of weight 0, which may hold NaN, adds nothing to the products: it
    is zero in both or, on PyTorch, left out.

    Args:
        left, right: Tensors `(H, K, ...)`.
    """
    if BACKEND == "torch":
        each, chosen = group_weights(weights, left)
        if chosen is not None:
            each = each.index_select(0, chosen)
            left = left.index_select(1, chosen)
            right = right.index_select(1, chosen)
        return left, right * each.to(right.dtype).reshape(_column(right, 1))
    column = reshape(weights, _column(left, 1))
    left, product = (
        keras.ops.where(column != 0, t, keras.ops.zeros((), t.dtype))
        for t in (left, right * keras.ops.cast(column, right.dtype))
    )
    return left, product


def _column(tensor, axis):
    shape = [1] * len(tensor.shape)
    shape[axis] = -1
    return shape


def combine(weights, stack):
    """The weighted sum of slices; one of weight 0 may hold NaN."""
    if BACKEND == "torch":
        each, chosen = group_weights(weights, stack)
        shape = stack.shape[1:]
        if chosen is not None:
            each = each.index_select(0, chosen)
            stack = stack.index_select(0, chosen)
        stack = stack.reshape(len(each), math.prod(shape))
        return (each.to(stack.dtype) @ stack).reshape(shape)
    weights = keras.ops.cast(weights, stack.dtype)
    column = reshape(weights, _column(stack, 0))
    if BACKEND == "jax":
        # A product: XLA on CPUs takes 100 times longer for the sum over the
        # leading axis, and compiles slice by slice into each user of it.
        clean = jnp.where(column != 0, stack, 0.0)
        highest = jax.lax.Precision.HIGHEST
        return jnp.tensordot(weights, clean, axes=1, precision=highest)
    return tf.reduce_sum(tf.math.multiply_no_nan(stack, column), axis=0)
