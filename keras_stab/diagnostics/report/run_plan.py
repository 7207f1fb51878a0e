"""What to run: arms and seeds, and the configuration of a run."""

import ast
import functools
import hashlib
import inspect
import json
import numbers
import textwrap
from collections.abc import Iterable
from collections.abc import Mapping
from typing import NamedTuple

import keras

from keras_stab._version import __version__
from keras_stab.arguments import checked_choice
from keras_stab.backend import devices

VARY = ("both", "initialisation", "order")


class RunSeeds(NamedTuple):
    """The two seeds of a run: of its first weights and of its data's order."""

    initialisation: int
    order: int


def make_seeds(seeds, vary="both"):
    """List of `RunSeeds`, all different.

    Args:
        seeds: Int, how many (0, 1, ...), or an iterable of ints or of pairs
            `(initialisation, order)`.
        vary: `"both"`: an int is both seeds; `"initialisation"` or `"order"`:
            it is this one and the other is 0.
    """
    checked_choice("vary", vary, VARY)
    if _is_int(seeds):
        listed = list(range(seeds))
    elif isinstance(seeds, Iterable) and not isinstance(seeds, str):
        listed = list(seeds)
    else:
        raise ValueError(
            "`seeds` must be an integer, or a list of integers or of pairs "
            f"(initialisation, order). Received: seeds={seeds!r}"
        )
    result = [_as_seeds(seed, vary) for seed in listed]
    if len(result) < 2:
        raise ValueError(
            "A report needs at least two seeds; five or more are advised. "
            f"Received: {len(result)} ({listed})"
        )
    twice = {seed for seed in result if result.count(seed) > 1}
    if twice:
        raise ValueError(
            "Every seed may be given only once. Received twice or more: "
            f"{sorted(twice)}"
        )
    return result


def _as_seeds(seed, vary):
    if _is_int(seed):
        return RunSeeds(
            initialisation=0 if vary == "order" else int(seed),
            order=0 if vary == "initialisation" else int(seed),
        )
    pair = tuple(seed) if isinstance(seed, (tuple, list)) else ()
    if len(pair) != 2 or not all(_is_int(part) for part in pair):
        raise ValueError(
            "A seed is a whole number of at least 0, or a pair "
            f"(initialisation, order) of those. Received: {seed!r}"
        )
    if vary != "both":
        raise ValueError(
            "Pairs of seeds already say what varies: leave out `vary`. "
            f"Received: vary={vary!r}"
        )
    return RunSeeds(*(int(part) for part in pair))


def _is_int(value):
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and value >= 0
    )


def make_arms(arms):
    """The checked arms, functions that make an optimizer, by name."""
    pairs = arms.items() if isinstance(arms, Mapping) else arms
    try:
        pairs = [(name, make) for name, make in pairs]
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`arms` must be a dict from a name to a function that makes an "
            "optimizer, such as {'SGD': keras.optimizers.SGD}. Received: "
            f"arms={arms!r}"
        ) from error
    if not pairs:
        raise ValueError("At least one arm is needed. Received: none")
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Every arm needs its own name. Received twice: {twice}"
        )
    for name, make in pairs:
        if not isinstance(name, str) or not name:
            raise ValueError(f"An arm's name is a string. Received: {name!r}")
        if isinstance(make, keras.optimizers.Optimizer) or not callable(make):
            raise ValueError(
                f"Arm {name!r} must be a function without arguments that "
                "makes a new optimizer for each run, such as "
                "functools.partial(keras_stab.SAM, 'sgd'). Received: "
                f"{make!r}"
            )
        first = make()
        if not isinstance(first, keras.optimizers.Optimizer):
            raise ValueError(
                f"Arm {name!r} must make a Keras optimizer. It made: {first!r}"
            )
        if make() is first:
            raise ValueError(
                f"Arm {name!r} makes the same optimizer again and again, and "
                "runs would inherit its state: make a new one in each call. "
                f"Received: {first!r}"
            )
    return dict(pairs)


def configuration(build_and_fit, make_optimizer, settings):
    """What a run's score depends on, as far as that is visible from here.

    Returns:
        Dict that JSON can hold.
    """
    try:
        settings = json.loads(json.dumps(settings or {}))
    except TypeError as error:
        raise ValueError(
            "`settings` must hold what JSON can (numbers, strings, lists, "
            f"dicts). Received: {settings!r}"
        ) from error
    return {
        "backend": devices.backend_name(),
        "keras": keras.version(),
        "keras_stab": __version__,
        "floatx": keras.config.floatx(),
        "dtype_policy": keras.config.dtype_policy().name,
        "build_and_fit": _fingerprint(build_and_fit),
        "optimizer": _describe(make_optimizer()),
        "settings": settings,
    }


def _describe(optimizer):
    try:
        config = keras.saving.serialize_keras_object(optimizer)
    except Exception:
        # An optimizer that cannot be saved is known by its class only.
        return type(optimizer).__name__
    return _without_names(json.loads(json.dumps(config, default=repr)))


def _without_names(config):
    """Drops the names, which Keras numbers and which change no score."""
    if isinstance(config, dict):
        return {
            key: _without_names(value)
            for key, value in config.items()
            if key != "name"
        }
    if isinstance(config, list):
        return [_without_names(value) for value in config]
    return config


def _fingerprint(function):
    """Changes with the code of a function, not with its comments."""
    if isinstance(function, functools.partial):
        parts = (function.args, sorted(function.keywords.items()))
        return f"{_fingerprint(function.func)} {_hash(repr(parts))}"
    if not inspect.isroutine(function):
        function = type(function)
    name = f"{function.__module__}.{function.__qualname__}"
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return name
    try:
        source = ast.dump(ast.parse(source))
    except SyntaxError:
        # A lambda in the middle of an expression.
        pass
    return f"{name} {_hash(source)}"


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]
