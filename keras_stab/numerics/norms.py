"""Norms of single variables, and the layer-wise trust ratio."""

import keras

_HALF = ("float16", "bfloat16")


def in_full_precision(tensor):
    """The same tensor, in float32 if it was of half precision."""
    if keras.backend.standardize_dtype(tensor.dtype) in _HALF:
        return keras.ops.cast(tensor, "float32")
    return tensor


def ratio_or_one(numerator, denominator, defined):
    """The quotient where `defined`, 1 elsewhere; never divides by zero."""
    safe = keras.ops.where(
        denominator > 0, denominator, keras.ops.ones_like(denominator)
    )
    return keras.ops.where(defined, numerator / safe, keras.ops.ones_like(safe))


def at_most(tensor, limit):
    """The tensor, or the limit where that is smaller, in the same dtype.

    On PyTorch `keras.ops.minimum` rounds double precision to float32.
    """
    return keras.ops.where(tensor > limit, limit, tensor)
