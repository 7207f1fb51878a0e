"""Trained weights come back before training, and after a call that raised.

A method of averages or slow weights may have lent the model other weights for
evaluation (`keras_stab.optimizers.lent_weights`).
"""

import contextlib
import warnings

from keras_stab import keras_internals
from keras_stab.backend import devices
from keras_stab.backend import processes
from keras_stab.backend import tracing
from keras_stab.gradients.train_step import takes_step
from keras_stab.memory import remembered
from keras_stab.nesting import whole_nest
from keras_stab.trainer.lending import lenders
from keras_stab.trainer.lending import take_back_from_fit


def take_back(model):
    """Gives the model its trained weights back, if evaluation borrowed it."""
    take_back_from_fit(model)
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


def warn_if_apart(model):
    """Warns once where each process of several trains a model of its own.

    Keras's step takes the gradients of the rows of its own process. No number
    is exchanged to find out: a process that waited for the others would hang
    where they do something else.
    """
    if devices.ranks() == 1:
        return
    optimizer = getattr(model, "optimizer", None)
    ours = [each for each in whole_nest(optimizer) if _is_ours(each)]
    known = remembered(model, "processes")
    if (
        not ours
        or takes_step(optimizer)
        or "apart" in known
        or processes.synchronise_themselves(keras_internals.all_layers(model))
    ):
        return
    known["apart"] = True
    warnings.warn(
        f"Each of {devices.ranks()} processes trains a model of its own, apart "
        "from the others: "
        f"{type(ours[0]).__name__} takes the gradients that it is given, and "
        "in `fit` those are of the rows of one process. To train one model, "
        "write the loop yourself around DistributedDataParallel, which sums "
        "the gradients",
        stacklevel=5,
    )


def _is_ours(optimizer):
    package = __name__.partition(".")[0]
    return any(
        kind.__module__.partition(".")[0] == package
        for kind in type(optimizer).__mro__
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
    if model.optimizer.built:
        variables += model.optimizer.variables
    return [(v, v.value) for v in variables if keras_internals.has_value(v)]


def _recover_state(model, state):
    """Gives variables their values back after a call has raised.

    On JAX Keras takes the values out of the variables while it runs, and does
    not put them back when `fit`, `evaluate` or `predict` raises.
    """
    if not state:
        return
    tracing.sync_state(model)
    keras_internals.forget_step_state(model)
    for variable, value in state:
        if not keras_internals.has_value(variable) and not value.is_deleted():
            variable.assign(value)
