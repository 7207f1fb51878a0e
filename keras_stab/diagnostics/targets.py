"""Whether data hold the targets that a loss needs."""

import keras

from keras_stab import keras_internals


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
