"""Norms of single variables, and the layer-wise trust ratio."""

import keras

_HALF = ("float16", "bfloat16")


def in_full_precision(tensor):
    """The same tensor, in float32 if it was of half precision."""
    if keras.backend.standardize_dtype(tensor.dtype) in _HALF:
        return keras.ops.cast(tensor, "float32")
    return tensor


def l2_norm(tensor):
    """The Euclidean norm; a sum in half precision overflows at norm 256."""
    tensor = in_full_precision(tensor)
    return keras.ops.sqrt(keras.ops.sum(keras.ops.square(tensor)))


def ratio_or_one(numerator, denominator, defined):
    """The quotient where `defined`, 1 elsewhere; never divides by zero."""
    safe = keras.ops.where(
        denominator > 0, denominator, keras.ops.ones_like(denominator)
    )
    return keras.ops.where(defined, numerator / safe, keras.ops.ones_like(safe))
