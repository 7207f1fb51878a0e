"""Assignments that are made, or stay, only where a condition holds."""

import keras

from keras_stab.backend import tracing
from keras_stab.backend.devices import BACKEND

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch


def run_if(condition, function, variables):
    """Runs `function()`, which assigns variables, where a boolean holds.

    Without waiting for an accelerator: there PyTorch runs it always, and takes
    back what it has assigned.

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
            for variable, value in zip(variables, before):
                variable.assign(value)
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
