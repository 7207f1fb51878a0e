"""Registers the classes that are saved, and loads what a file holds.

What a user writes is checked. What a configuration holds was checked when it
was written, and a callback or an assignment may have changed it since: a
learning rate that a schedule took a hair below 0 must not make a file
unreadable. So within `from_config` the checks of `keras_stab.arguments` warn
of numbers out of range, and keep them.
"""

import contextlib
import contextvars
from typing import Any
from typing import TypeVar

import keras

Kind = TypeVar("Kind", bound=type)

_loading = contextvars.ContextVar("loading", default=False)


def is_loading() -> bool:
    """Whether the arguments that are checked come from a configuration."""
    return _loading.get()


@contextlib.contextmanager
def loading():
    """Within it, numbers out of range raise a warning, not an error."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def registered(kind: Kind) -> Kind:
    """Registers a class under `keras_stab`; a decorator."""
    changed: Any = kind
    original = changed.from_config.__func__

    def from_config(
        cls: Any, config: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        with loading():
            return original(cls, config, *args, **kwargs)

    from_config.__doc__ = original.__doc__
    changed.from_config = classmethod(from_config)
    return keras.saving.register_keras_serializable(package="keras_stab")(kind)
