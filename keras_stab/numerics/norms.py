"""Precision in which norms are taken, and quotients of them."""

import functools

import keras

_HALF = ("float16", "bfloat16")


def in_full_precision(tensor):
    """The same tensor, in float32 if it was of half precision."""
    if _name(tensor.dtype) in _HALF:
        return keras.ops.cast(tensor, "float32")
    return tensor


def common_dtype(tensors):
    """The widest dtype among tensors in full precision, a string."""
    dtypes = {_name(t.dtype) for t in tensors}
    return "float64" if "float64" in dtypes else "float32"


@functools.cache
def _name(dtype):
    # Cached: without it this is most of what a cast that does nothing costs.
    return keras.backend.standardize_dtype(dtype)


@functools.cache
def is_float_dtype(dtype):
    """Whether a dtype is a floating one; remembered, as above."""
    return keras.backend.is_float_dtype(dtype)


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
