"""Checks of arguments, with one wording for the whole library.

Each check returns the value as plain Python, so that a NumPy scalar that a
user passes can be written into a configuration.
"""

import difflib
import math
import numbers
import re
import warnings

import keras
import numpy as np

from keras_stab.registration import is_loading

# What a variable of float32 or int32 can hold.
LARGEST_NUMBER = float(np.finfo("float32").max)
SMALLEST_NUMBER = float(np.finfo("float32").tiny)
LARGEST_COUNT = int(np.iinfo("int32").max)


def checked_number(
    argument,
    value,
    minimum=-math.inf,
    below=math.inf,
    *,
    above=-math.inf,
    maximum=math.inf,
    optional=False,
):
    """The value as a float.

    Args:
        argument: Name for messages.
        minimum, maximum: Smallest and largest values allowed.
        above, below: Limits that are not allowed themselves.
        optional: Whether `None` is allowed too.

    Raises:
        ValueError: If it is no finite number in range.
    """
    if optional and value is None:
        return None
    given, value = value, _plain(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        _refuse(argument, "a number", given, optional)
    value = _as_float(value)
    too_small = above == 0.0 and value < SMALLEST_NUMBER
    if not (minimum <= value <= maximum and above < value < below):
        limits = _limits(minimum, above, maximum, below)
        _out_of_range(argument, limits, given, optional)
    elif abs(value) > LARGEST_NUMBER or too_small:
        limits = "within the range of 32-bit floats"
        _out_of_range(argument, limits, given, optional)
    return value


def checked_fraction(argument, value, zero=False, one=True, optional=False):
    """The value as a float between 0 and 1.

    Args:
        argument: Name for messages.
        zero, one: Whether these ends are allowed.
        optional: Whether `None` is allowed too.
    """
    return checked_number(
        argument,
        value,
        minimum=0.0 if zero else -math.inf,
        above=-math.inf if zero else 0.0,
        maximum=1.0 if one else math.inf,
        below=math.inf if one else 1.0,
        optional=optional,
    )


def checked_boolean(argument, value, optional=False):
    """The value as `True` or `False`, or `None` where that is allowed."""
    if optional and value is None:
        return None
    plain = _plain(value)
    if not isinstance(plain, bool):
        _refuse(argument, "a boolean", value, optional)
    return plain


def checked_count(
    argument, value, minimum, maximum=LARGEST_COUNT, optional=False
):
    """The value as an int from `minimum` to `maximum`.

    Args:
        argument: Name for messages.
        minimum, maximum: Smallest and largest values allowed.
        optional: Whether `None` is allowed too.
    """
    if optional and value is None:
        return None
    plain = _plain(value)
    whole = isinstance(plain, numbers.Integral) and not isinstance(plain, bool)
    if whole and minimum <= plain <= maximum:
        return int(plain)
    limits = f"an integer of at least {minimum}"
    if maximum != LARGEST_COUNT:
        limits = f"an integer from {minimum} to {maximum}"
    if not whole:
        _refuse(argument, limits, value, optional)
    if plain > maximum == LARGEST_COUNT:
        limits += " that 32 bits can hold"
    _out_of_range(argument, limits, value, optional)
    return int(plain)


def checked_axis(axis):
    """The axis of a tensor as an int, or `None`."""
    plain = _plain(axis)
    if plain is None:
        return None
    if not isinstance(plain, numbers.Integral) or isinstance(plain, bool):
        _refuse("axis", "an integer", axis, optional=True)
    return int(plain)


def checked_choice(argument, value, choices):
    """The one of the choices that equals the value."""
    plain = _plain(value)
    for choice in choices:
        if type(choice) in type(plain).__mro__ and choice == plain:
            return choice
    raise ValueError(
        f"`{argument}` must be one of {tuple(choices)}. Received: "
        f"{argument}={value!r}"
    )


def checked_choices(argument, value, choices):
    """The values, a list or tuple of some of the choices, as a tuple."""
    is_list = isinstance(value, (list, tuple, set, frozenset)) and value
    if not is_list or not all(
        isinstance(each, str) and each in choices for each in value
    ):
        raise ValueError(
            f"`{argument}` must be a list or tuple with one or more of "
            f"{tuple(choices)}. Received: {argument}={value!r}"
        )
    return tuple(value)


def checked_pattern(argument, value):
    """The value, if it is a regular expression."""
    if not isinstance(value, str):
        raise ValueError(
            f"`{argument}` must be a regular expression for the paths of "
            f"variables. Received: {value!r} of type {type(value).__name__}"
        )
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"`{argument}` must be a regular expression for the paths of "
            f"variables, and this one does not compile: {error}. Received: "
            f"{value!r}"
        ) from error
    return value


def checked_learning_rate(value, argument="learning_rate"):
    """Numbers as floats, which Keras insists on; schedules as they are."""
    schedules = keras.optimizers.schedules
    if isinstance(value, dict):  # a serialized schedule
        try:
            return schedules.deserialize(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`{argument}` holds no configuration of a learning-rate "
                f"schedule. Received: {argument}={value!r}"
            ) from error
    if isinstance(value, type):
        raise ValueError(
            f"`{argument}` must be a number or a schedule, not a class: write "
            f"{value.__name__}(...). Received: {argument}={value!r}"
        )
    if callable(value):  # schedules are
        return value
    return checked_number(argument, value, minimum=0.0)


def checked_optimizer(argument, value, owner=None):
    """The optimizer that an object, a name or a config stands for.

    Args:
        argument: Name for messages.
        owner: Name of the wrapper around it, for the example in a message.
    """
    if isinstance(value, dict) and "class_name" not in value:
        raise ValueError(
            f"`{argument}` must be one optimizer. For a dict with one for each "
            "player of a game write keras_stab.games.PlayerOptimizers({...}). "
            f"Received: {argument}={value!r}"
        )
    found, reason = None, None
    try:
        found = None if value is None else keras.optimizers.get(value)
    except (TypeError, ValueError) as error:
        # A config or a name that Keras knows, with faults of its own.
        if isinstance(value, dict):
            raise
        reason = error
    if found is None:
        raise ValueError(
            f"`{argument}` must be an optimizer, its name or its config"
            f"{_advice_on_optimizer(value, owner)}. "
            f"Received: {argument}={value!r}"
        ) from reason
    return found


def _advice_on_optimizer(value, owner):
    """What was meant by something that is no optimizer, as an example."""
    kinds = keras.optimizers
    names = {
        name.lower(): name
        for name, kind in vars(kinds).items()
        if isinstance(kind, type) and issubclass(kind, kinds.Optimizer)
    }
    if isinstance(value, str):
        near = difflib.get_close_matches(value.lower(), names, n=1)
        return f", for example {near[0]!r}" if near else ""
    if isinstance(value, type) and issubclass(value, kinds.Optimizer):
        name = value.__name__
        if names.get(name.lower()) == name:
            name = f"keras.optimizers.{name}"
        example = f"{name}({0.1 if name.endswith('SGD') else 0.001})"
    elif isinstance(_plain(value), numbers.Real):
        example = f"keras.optimizers.SGD({value!r})"
    elif isinstance(value, kinds.schedules.LearningRateSchedule):
        example = f"keras.optimizers.SGD({type(value).__name__}(...))"
    else:
        return ""
    return ", for example " + (f"{owner}({example})" if owner else example)


def _plain(value):
    """A NumPy scalar or array without dimensions as plain Python."""
    is_scalar = isinstance(value, np.generic) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    )
    return value.item() if is_scalar else value


def _as_float(value):
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _limits(minimum, above, maximum, below):
    """What a number must be, in words; an interval where both ends are."""
    low, high = max(minimum, above), min(maximum, below)
    if math.isinf(low) and math.isinf(high):
        return "finite"
    lower = f"above {low:g}" if above >= minimum else f"at least {low:g}"
    upper = f"below {high:g}" if below <= maximum else f"at most {high:g}"
    if math.isinf(high):
        return lower
    if math.isinf(low):
        return upper
    opening = "(" if above >= minimum else "["
    closing = ")" if below <= maximum else "]"
    return f"in {opening}{low:g}, {high:g}{closing}"


def refuse_numbers(message):
    """Raises a `ValueError`; warns where a configuration holds the numbers."""
    if not is_loading():
        raise ValueError(message)
    warnings.warn(
        f"A configuration is loaded as it is, although {message}",
        stacklevel=4,
    )


def _out_of_range(argument, limits, value, optional):
    refuse_numbers(_message(argument, limits, value, optional))


def _refuse(argument, what, value, optional):
    raise ValueError(_message(argument, what, value, optional))


def _message(argument, what, value, optional):
    suffix = " or None" if optional else ""
    return (
        f"`{argument}` must be {what}{suffix}. Received: {argument}={value!r}"
    )
