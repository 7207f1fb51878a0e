"""Checks of arguments that are not numbers: functions, patterns, optimizers.

With the wording of `keras_stab.arguments`.
"""

import difflib
import inspect
import numbers
import os
import re

import keras

from keras_stab.arguments import checked_number
from keras_stab.arguments import plain


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


def checked_function(argument, value, parameters):
    """The value, if it is a function of parameters in this order.

    Args:
        argument: Name for messages.
        parameters: Their names, for messages too.
    """
    fits = callable(value) and not isinstance(value, type)
    if fits:
        try:
            inspect.signature(value).bind(*parameters)
        except TypeError:
            fits = False
        except ValueError:  # some callables written in C have no signature
            pass
    if not fits:
        raise ValueError(
            f"`{argument}` must be a function ({', '.join(parameters)}) -> "
            f"value. Received: {argument}={value!r}"
        )
    return value


def checked_path(argument, value):
    """The value, if it can be the path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(
            f"`{argument}` must be a non-empty path. Received: "
            f"{argument}={value!r}"
        )
    return value


def checked_learning_rate(value, argument="learning_rate"):
    """Numbers as floats, which Keras insists on; schedules as they are."""
    if isinstance(value, dict):
        return deserialized_schedule(argument, value)
    if isinstance(value, type):
        raise ValueError(
            f"`{argument}` must be a number or a schedule, not a class: write "
            f"{value.__name__}(...). Received: {argument}={value!r}"
        )
    if callable(value):  # schedules are
        return value
    return checked_number(argument, value, minimum=0.0)


def deserialized_schedule(argument, config):
    """The learning-rate schedule that a configuration stands for."""
    try:
        return keras.optimizers.schedules.deserialize(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` is not the configuration of a schedule: {error}. "
            f"Received: {argument}={config!r}"
        ) from error


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
    if isinstance(value, keras.optimizers.Optimizer):
        return value
    cause = None
    try:
        if isinstance(value, (str, dict)):
            return keras.optimizers.get(value)
    except (TypeError, ValueError) as error:
        cause = error
    advice = _advice_on_optimizer(value, owner)
    if isinstance(value, dict):
        advice = f": {cause}"
    raise ValueError(
        f"`{argument}` must be an optimizer, its name or its config{advice}. "
        f"Received: {argument}={value!r}"
    ) from cause


def _advice_on_optimizer(value, owner):
    """An example of what was meant by something that is not an optimizer."""
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
    elif isinstance(plain(value), numbers.Real):
        example = f"keras.optimizers.SGD({plain(value)!r})"
    elif isinstance(value, kinds.schedules.LearningRateSchedule):
        example = f"keras.optimizers.SGD({type(value).__name__}(...))"
    else:
        return ""
    return ", for example " + (f"{owner}({example})" if owner else example)
