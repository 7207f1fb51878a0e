"""Evaluation weights of several methods go into a model together."""

import contextlib
import warnings

from keras_stab.batch_norm import batch_norm_layers


@contextlib.contextmanager
def lent_weights(model, methods, refresh=None):
    """Lends the model the evaluation weights of all methods.

    Args:
        model: The model.
        methods: List of `LendsWeights`. If one has lent already, nothing
            is done.
        refresh: As for `lend_evaluation_weights`.
    """
    if any(method.swapped for method in methods):
        yield model
        return
    for method in methods:
        if not method.has_evaluation_weights():
            raise ValueError(method.nothing_to_lend())
    lend_evaluation_weights(model, methods, refresh)
    try:
        yield model
    finally:
        return_trained_weights(model, methods)


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
