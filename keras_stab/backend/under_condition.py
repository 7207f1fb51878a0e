"""Assignments that are made, or stay, only where a condition holds."""

import keras

from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch


def run_if(condition, function, variables):
    """Runs `function()`, which assigns variables, where a boolean holds.

    Without waiting for an accelerator: there it runs always on PyTorch and
    JAX, and what it has assigned is taken back.

    Args:
        condition: Boolean, or boolean scalar tensor.
        function: Function without arguments or results.
        variables: All that it may assign.
    """
    if isinstance(condition, bool):
        if condition:
            function()
    elif BACKEND == "tensorflow":

        def run():
            function()
            return True

        tf.cond(condition, run, lambda: False)
    elif BACKEND == "jax" and not devices.has_accelerator():
        # Selected, old and new values would both be wanted, and the compiler
        # would copy what an optimizer overwrites. A branch overwrites it.
        before = values_before(variables)

        def values_after():
            try:
                function()
                return [v.value for v in variables]
            finally:
                _assign(variables, before)

        _assign(
            variables, jax.lax.cond(condition, values_after, lambda: before)
        )
    else:
        before = values_before(variables)
        function()
        take_back_unless(condition, variables, before)


def values_before(variables):
    """The values of variables, which later assignments do not change."""
    return [tracing.snapshot(v) for v in variables]


def take_back_unless(condition, variables, before):
    """Gives variables earlier values, except where a boolean holds.

    Args:
        condition: Boolean scalar tensor.
        variables: List of variables.
        before: Their `values_before`.
    """
    if BACKEND == "tensorflow":

        def take_back():
            _assign(variables, before)
            return True

        tf.cond(condition, lambda: False, take_back)
    elif BACKEND == "torch":
        with torch.no_grad():
            for variable, value in zip(variables, before):
                now = variable.value.data
                torch.where(condition, now, value, out=now)
    else:
        for variable, value in zip(variables, before):
            if variable.value is not value:
                now = keras.ops.where(condition, variable.value, value)
                variable.assign(now)


def _assign(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(value)
