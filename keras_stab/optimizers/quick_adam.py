"""Keras's Adam and AdamW in one pass over the weights, inside a method."""

import contextlib
import functools

import keras
import numpy as np

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import in_place

_KINDS = keras.optimizers.Adam, keras.optimizers.AdamW


@contextlib.contextmanager
def quickly(optimizer):
    """Within it, Adam or AdamW of Keras moves the weights in one pass.

    On a processor with PyTorch; any other optimizer, and any step that the
    kernel does not serve, runs as before. Clipping, decay, averages and
    accumulation are those of Keras around it.
    """
    if not (devices.EAGER and _is_known(optimizer)):
        yield
        return
    attributes = vars(optimizer)
    attributes[keras_internals.UPDATE_STEP] = functools.partial(
        _update, optimizer
    )
    try:
        yield
    finally:
        del attributes[keras_internals.UPDATE_STEP]


def _is_known(optimizer):
    """Not a class of users: its rule may be another one."""
    kind = type(optimizer)
    return (
        isinstance(optimizer, _KINDS)
        and kind.__module__.partition(".")[0] == "keras"
        and kind.__name__ in ("Adam", "AdamW")
        and not optimizer.amsgrad
    )


def _update(optimizer, gradients, variables, learning_rate):
    moments = keras_internals.adam_moments(optimizer, variables)
    if not in_place.has_kernel([*variables, *moments[0]], gradients):
        usual = getattr(type(optimizer), keras_internals.UPDATE_STEP)
        usual(optimizer, gradients, variables, learning_rate)
        return
    in_place.step_of_adam(
        variables,
        moments,
        gradients,
        _corrected(optimizer, learning_rate, variables[0].dtype),
        (optimizer.beta_1, optimizer.beta_2),
        optimizer.epsilon,
    )


def _corrected(optimizer, learning_rate, dtype):
    """The rate with the bias corrections, rounded as Keras does."""
    number = np.dtype(dtype).type
    step = number(int(optimizer.iterations) + 1)
    first, second = (
        1 - number(beta) ** step
        for beta in (optimizer.beta_1, optimizer.beta_2)
    )
    return float(number(float(learning_rate)) * np.sqrt(second) / first)
