"""Evaluation weights of several methods go into a model together.

`fit` lends them by itself; a `with` block or a callback lends them in place of
what `fit` has lent.
"""

import contextlib
import warnings

from keras_stab.batch_norm import batch_norm_layers
from keras_stab.memory import remembered
from keras_stab.nesting import nest
from keras_stab.nesting import whole_nest

_WARNED = "warned of batch norm"


def lenders(model):
    """The methods in the optimizer that may have lent the model weights."""
    optimizers = whole_nest(getattr(model, "optimizer", None))
    return [each for each in optimizers if hasattr(each, "swap_out")]


def outermost_lenders(optimizer):
    """The methods that decide what is evaluated: the first of every nest."""
    for each in nest(optimizer):
        if hasattr(each, "swap_out"):
            return [each]
    parts = getattr(optimizer, "optimizers", None) or []
    return [method for part in parts for method in outermost_lenders(part)]


@contextlib.contextmanager
def lent_weights(model, methods, refresh=None):
    """Lends the model the evaluation weights of all methods.

    Args:
        model: The model.
        methods: List of `LendsWeights`. If a block or a callback has lent
            those of one already, nothing is done.
        refresh: As for `lend_evaluation_weights`.
    """
    if any(method.swapped and not method.lent_by_fit for method in methods):
        yield model
        return
    for method in methods:
        if not method.has_evaluation_weights():
            raise ValueError(method.nothing_to_lend())
    by_fit = take_back_from_fit(model)
    try:
        lend_evaluation_weights(model, methods, refresh)
        try:
            yield model
        finally:
            return_trained_weights(model, methods)
    finally:
        lend_as_fit_does(model, by_fit)


def lend_evaluation_weights(model, methods, refresh=None):
    """Puts the evaluation weights of all methods into the model.

    Args:
        methods: List of `LendsWeights`.
        refresh: Function without arguments that computes the batch-norm
            statistics of the evaluation weights, or `None`.
    """
    if refresh is None and batch_norm_layers(model):
        warnings.warn(
            "The model has batch-norm layers, whose statistics belong to the "
            f"trained weights, not to the {methods[0].evaluation_name}: pass "
            "training data to compute them again",
            stacklevel=5,
        )
    try:
        for i, method in enumerate(methods):
            method.swap_in(model, statistics=refresh is not None and i == 0)
        if refresh is not None:
            refresh()
    except BaseException:
        return_trained_weights(model, methods)
        raise


def return_trained_weights(model, methods):
    """Puts the trained weights of all methods back."""
    for method in methods:
        method.swap_out(model)


def lend_as_fit_does(model, methods):
    """Lends the weights of all methods until training goes on."""
    if not methods or any(method.swapped for method in methods):
        return
    try:
        for method in methods:
            method.swap_in(model, by_fit=True)
    except BaseException:
        return_trained_weights(model, methods)
        raise
    _warn_of_batch_norm(model, methods[0])


def take_back_from_fit(model):
    """Puts the trained weights back where the model holds what `fit` lent.

    Other weights that were put in since are what training goes on from, as
    without a loan.

    Returns:
        The methods whose trained weights came back.
    """
    methods = []
    for method in lenders(model):
        if method.finds_weights_in_place_of_lent():
            method.forget_trained_weights()
        elif method.lent_by_fit:
            method.swap_out(model)
            methods.append(method)
    return methods


def _warn_of_batch_norm(model, method):
    known = remembered(model, _WARNED)
    if known or not batch_norm_layers(model):
        return
    known[True] = True
    warnings.warn(
        "From the end of `fit` the model holds the "
        f"{method.evaluation_name} of {type(method).__name__}. Its batch-norm "
        "layers keep the statistics of the trained weights: give `fit` the "
        f"callback keras_stab.{method.evaluation_callback}"
        "(batch_norm_data=...) to compute them again, or the optimizer "
        'evaluate_with="trained"',
        stacklevel=6,
    )
