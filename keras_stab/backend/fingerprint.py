"""A number by which tensors are recognised, the same on every machine."""

import keras
import numpy as np

from keras_stab.backend import devices
from keras_stab.backend import tracing

# Entries per pass, where every operation makes a tensor of its own.
AT_ONCE = 2**22


def fingerprint(tensors: list) -> int:
    """A 32-bit int, from the bits of all entries and their positions.

    Computed on the device, in one go, and read from there. Whole numbers
    only: their sums do not depend on how the tensors are laid out.
    """
    tensors = [t for t in tensors if np.prod(t.shape)]
    if not tensors:
        return 0
    with tracing.no_gradients():
        compute = _sums if devices.EAGER else tracing.as_kernel(_sums)
        sums = keras.ops.convert_to_numpy(compute(tensors))
    total = 0
    for each in sums.tolist():
        total = (31 * total + each) % 2**32
    return total


def _sums(tensors):
    return keras.ops.stack([_sum(t) for t in tensors])


def _sum(tensor):
    ops = keras.ops
    tensor = ops.reshape(tensor, (-1,))
    single = ops.cast(tensor, "float32")
    total = _sum_of_bits(single)
    if keras.backend.standardize_dtype(tensor.dtype) == "float64":
        rest = ops.cast(tensor - ops.cast(single, "float64"), "float32")
        total = total + 31 * _sum_of_bits(rest)
    return total


def _sum_of_bits(values):
    size = values.shape[0]
    step = AT_ONCE if devices.EAGER else size
    total = 0
    for start in range(0, size, step):
        total = total + _sum_of_part(values[start : start + step], start)
    return total


def _sum_of_part(values, start):
    ops = keras.ops
    bits = ops.view(values, "int32")
    # Mixed, so that no simple change of all entries, a sign for example,
    # leaves the sum as it is.
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        bits = ops.bitwise_xor(bits, ops.right_shift(bits, 15)) * multiplier
    places = ops.arange(start, start + values.shape[0], dtype="int32")
    return ops.sum(bits * (2 * places + 1))
