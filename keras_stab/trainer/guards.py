"""Trained weights come back before training, and after a call that raised.

A method of averages or slow weights may have lent the model other weights for
evaluation (`keras_stab.optimizers.lent_weights`).
"""

import contextlib
import warnings

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import tracing
from keras_stab.nesting import whole_nest


def lenders(model):
    """The methods in the optimizer that may have lent the model weights."""
    optimizers = whole_nest(getattr(model, "optimizer", None))
    return [each for each in optimizers if hasattr(each, "swap_out")]


def take_back(model):
    """Gives the model its trained weights back, if evaluation borrowed it."""
    for method in lenders(model):
        method.swap_out(model)


def begin_again(model):
    """Lets methods notice that the model holds weights other than theirs.

    Once per call of `fit`, after the trained weights came back.
    """
    methods = [
        each
        for each in whole_nest(getattr(model, "optimizer", None))
        if hasattr(each, "finds_other_weights") and each.finds_other_weights()
    ]
    for method in methods:
        method.restart()
    if methods:
        names = ", ".join(type(method).__name__ for method in methods)
        warnings.warn(
            "Other weights were put into the model since the last call of "
            f"`fit`: {names} starts again from these. What belonged to the "
            "earlier weights (iterate, slow weights, average or gradients) is "
            "dropped",
            stacklevel=5,
        )


@contextlib.contextmanager
def taking_back_on_error(model):
    """Ends what a callback began in this call, when the call raises."""
    methods = lenders(model)
    lent_before = any(method.swapped for method in methods)
    state = _held_state(model) if methods else []
    try:
        yield
    except BaseException:
        _recover_state(model, state)
        if not lent_before:
            take_back(model)
        raise


def _held_state(model):
    """What `_recover_state` needs; nothing but references."""
    if not devices.FUNCTIONAL:
        return []
    variables = [*model.variables, *model.metrics_variables]
    return [(v, v.value) for v in variables if keras_internals.has_value(v)]


def _recover_state(model, state):
    """Gives variables their values back after `evaluate` has raised.

    On JAX Keras takes the values out of the variables while it runs, and does
    not put them back when `evaluate` or `predict` raises.
    """
    if not state:
        return
    tracing.sync_state(model)
    for variable, value in state:
        if not keras_internals.has_value(variable) and not value.is_deleted():
            variable.assign(value)
