"""Checks of the arguments of SAM."""

import keras

from keras_stab.nesting import nest
from keras_stab.object_arguments import checked_function


def checked_filter(value):
    """`None`, `"normalization"`, or a function of paths, also as a config."""
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if value is None or isinstance(value, str) and value == "normalization":
        return value
    if not callable(value):
        raise ValueError(
            '`variable_filter` must be None, "normalization" or a function '
            "from a path to a boolean. Received: "
            f"variable_filter={value!r}"
        )
    return checked_function("variable_filter", value, ("path",))


def check_inner(optimizer):
    """Raises a `ValueError` for an inner optimizer that cannot be used."""
    for each in nest(optimizer):
        if getattr(each, "sees_unperturbed_weights_only", False):
            raise ValueError(
                f"{type(each).__name__} must not look at perturbed weights: "
                f"put SAM inside it, {type(each).__name__}(SAM(...))"
            )
        if getattr(each, "perturbs_weights", False):
            raise ValueError("SAM inside SAM would perturb twice: use one")
