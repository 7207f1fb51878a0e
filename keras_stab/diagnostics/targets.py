"""Whether there is a loss to measure, and data hold the targets for it."""

import keras

from keras_stab import keras_internals
from keras_stab.backend import tracing


def has_own_loss(model):
    """Whether the model computes its loss itself."""
    return type(model).compute_loss is not keras.Model.compute_loss


def check_targets(argument, data, batches, model, loss=None):
    """Raises a `ValueError` if a loss needs targets and there are none.

    Args:
        argument: Name of the argument for messages.
        data: What was passed as that argument.
        batches: The batches `(x, y, sample_weight)` in it.
        model: A `keras.Model`.
        loss: As for `sharpness`.
    """
    if loss is None:
        compiled = keras_internals.compile_loss(model) is not None
        if has_own_loss(model) or not compiled:
            return
    if any(y is None for _, y, _ in batches):
        raise ValueError(
            f"`{argument}` holds inputs without targets, which the loss needs: "
            f"pass {argument}=(x, y), or batches of such pairs. Received: "
            f"{argument} of type {type(data).__name__}"
        )


def check_loss(model, loss=None):
    """Raises a `ValueError` if there is no loss, given or compiled."""
    if loss is None:
        own = has_own_loss(model)
        compiled = keras_internals.compile_loss(model) is not None
        if not model.compiled or not (own or compiled):
            raise ValueError(
                "The model has no loss: compile it with one, or pass `loss`. "
                f"Received: loss=None, model {model.name!r}"
            )
    elif not (isinstance(loss, str) or callable(loss)):
        hint = ""
        if hasattr(loss, "shape"):
            hint = ". Inputs and targets are passed as one tuple, (x, y)"
        raise ValueError(
            "`loss` must be a keras.losses.Loss, its name, or a function of "
            f"(y, y_pred){hint}. Received: loss of type {type(loss).__name__}"
        )


def build_loss(model, batch, loss=None):
    """Builds the model, and the loss of `compile`, where they are not."""
    x, y, sample_weight = batch
    unbuilt = loss is None and not keras_internals.loss_is_built(model)
    if model.built and not unbuilt:
        return
    with tracing.no_gradients():
        if not model.built:
            model(x)
        if not unbuilt:
            return
        own = has_own_loss(model)
        with keras.StatelessScope():
            y_pred = model(x)
            if not own:
                # As a step does it: only then may targets be, for example, a
                # dict for a list of outputs.
                keras_internals.compiled_loss(model, y, y_pred, sample_weight)
        if own:  # which may call it, or not
            keras_internals.build_loss(model, y, y_pred)
