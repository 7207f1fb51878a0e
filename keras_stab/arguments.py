"""Checks of arguments, with one wording for the whole library.

Each check returns the value as plain Python, so that a NumPy scalar that a
user passes can be written into a configuration.
"""

import math
import numbers
import warnings

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
        ValueError: If it is not a finite number in range.
    """
    if optional and value is None:
        return None
    given, value = value, plain(value)
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
    found = plain(value)
    if not isinstance(found, bool):
        _refuse(argument, "a boolean", value, optional)
    return found


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
    found = plain(value)
    whole = isinstance(found, numbers.Integral) and not isinstance(found, bool)
    if whole and minimum <= found <= maximum:
        return int(found)
    limits = f"an integer of at least {minimum}"
    if maximum != LARGEST_COUNT:
        limits = f"an integer from {minimum} to {maximum}"
    if not whole:
        _refuse(argument, limits, value, optional)
    if found > maximum == LARGEST_COUNT:
        limits += " that 32 bits can hold"
    _out_of_range(argument, limits, value, optional)
    return int(found)


def checked_axis(axis):
    """The axis of a tensor as an int, or `None`."""
    found = plain(axis)
    if found is None:
        return None
    if not isinstance(found, numbers.Integral) or isinstance(found, bool):
        _refuse("axis", "an integer", axis, optional=True)
    return int(found)


def checked_choice(argument, value, choices):
    """The one of the choices that equals the value."""
    found = plain(value)
    for choice in choices:
        if type(choice) in type(found).__mro__ and choice == found:
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


def plain(value):
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
    """Raises a `ValueError`; for a loaded configuration only warns."""
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
