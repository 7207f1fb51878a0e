"""Precision in which norms are taken, and quotients of them."""

import keras

_HALF = ("float16", "bfloat16")


def in_full_precision(tensor):
    """The same tensor, in float32 if it was of half precision."""
    if keras.backend.standardize_dtype(tensor.dtype) in _HALF:
        return keras.ops.cast(tensor, "float32")
    return tensor


def common_dtype(tensors):
    """The widest dtype among tensors in full precision, a string."""
    dtypes = {t.dtype for t in tensors}
    dtypes = {keras.backend.standardize_dtype(dtype) for dtype in dtypes}
    return "float64" if "float64" in dtypes else "float32"


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
