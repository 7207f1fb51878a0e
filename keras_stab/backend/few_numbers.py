"""Arithmetic with few numbers: by NumPy where they are at hand.

On a processor with PyTorch every operation of Keras on a scalar takes longer
than the arithmetic; elsewhere the step is compiled.
"""

import keras
import numpy as np

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "torch":
    import torch


def at_hand(tensors):
    """Whether Python can read them all without waiting for a device."""
    return (
        BACKEND == "torch"
        and not torch.compiler.is_compiling()
        and all(t.device.type == "cpu" for t in tensors)
    )


def namespace(dtype, tensors, variables):
    """What computes with tensors and values of variables, and these for it.

    Args:
        dtype: That of the variables, to which the tensors are cast.

    Returns:
        NumPy with arrays, or `keras.ops` with tensors: a module, a list for
        the tensors and one for the variables.
    """
    values = [tracing.read(v) for v in variables]
    if not at_hand([*tensors, *values]):
        return keras.ops, [keras.ops.cast(t, dtype) for t in tensors], values
    return (
        np,
        [t.detach().numpy().astype(dtype, copy=False) for t in tensors],
        [value.detach().numpy() for value in values],
    )


def store(variables, values, new):
    """Assigns new values, computed from `values` of `namespace`."""
    for variable, value, other in zip(variables, values, new):
        if isinstance(value, np.ndarray):
            value[...] = other  # the memory of the variable
        else:
            variable.assign(other)


def as_tensor(value):
    """A vector of either kind, for operations on tensors."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def as_factor(value):
    """A scalar of either kind, for operations on tensors."""
    is_array = isinstance(value, (np.ndarray, np.generic))
    return float(value) if is_array else value
