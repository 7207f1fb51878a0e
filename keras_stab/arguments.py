"""Checks of hyper-parameters, with one wording for all optimizers."""

import math
import numbers

import keras
import numpy as np


def checked_number(
    argument, value, minimum=-math.inf, below=math.inf, forbidden=()
):
    """The value as a float.

    Args:
        argument: Name for messages.
        minimum: Smallest value allowed.
        below: First value that is too large.
        forbidden: Values that are not allowed although in range.

    Raises:
        ValueError: If it is no finite number in range.
    """
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    )
    if not is_number or isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"`{argument}` must be a number. Received: {argument}={value!r}"
        )
    value = float(value)
    if not math.isfinite(value) or not minimum <= value < below:
        limits = f"at least {minimum}" if minimum > -math.inf else "finite"
        if below < math.inf:
            limits += f" and below {below}"
        raise ValueError(
            f"`{argument}` must be {limits}. Received: {argument}={value}"
        )
    if value in forbidden:
        raise ValueError(
            f"`{argument}` must not be {value}. Received: {argument}={value}"
        )
    return value


def checked_optional(argument, value, minimum=-math.inf, forbidden=()):
    """As `checked_number`; `None` is allowed too."""
    if value is None:
        return None
    return checked_number(argument, value, minimum, forbidden=forbidden)


def checked_boolean(argument, value):
    """The value, if it is `True` or `False`."""
    if not isinstance(value, bool):
        raise ValueError(
            f"`{argument}` must be a boolean. Received: {argument}={value!r}"
        )
    return value


def checked_count(argument, value, minimum, maximum=math.inf):
    """The value as an int from `minimum` to `maximum`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not minimum <= value <= maximum:
        limits = f"of at least {minimum}"
        if maximum < math.inf:
            limits = f"from {minimum} to {maximum}"
        raise ValueError(
            f"`{argument}` must be an integer {limits}. "
            f"Received: {argument}={value!r}"
        )
    return int(value)


def checked_learning_rate(value):
    """Numbers as floats, which Keras insists on; schedules as they are."""
    if callable(value) or isinstance(
        value, keras.optimizers.schedules.LearningRateSchedule
    ):
        return value
    if isinstance(value, dict):  # a serialized schedule
        return keras.optimizers.schedules.deserialize(value)
    return checked_number("learning_rate", value, minimum=0.0)


def checked_optimizer(argument, value):
    """The optimizer that an object, a name or a config stands for."""
    if isinstance(value, dict) and "class_name" not in value:
        raise ValueError(
            f"`{argument}` must be one optimizer. For a dict with one for each "
            "player of a game write keras_stab.games.PlayerOptimizers({...}). "
            f"Received: {argument}={value!r}"
        )
    found = None if value is None else keras.optimizers.get(value)
    if found is None:
        raise ValueError(
            f"`{argument}` must be an optimizer, its name or its config. "
            f"Received: {argument}={value!r}"
        )
    return found


def checked_choice(argument, value, choices):
    """The value, if it is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {choices}. Received: "
            f"{argument}={value!r}"
        )
    return value
