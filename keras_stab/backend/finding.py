"""Imports Keras, and says what to do when Keras finds no backend.

Imported before everything else, and so without anything of Keras.
"""

import importlib.util
import os
import sys

_TRAIN = ("tensorflow", "jax", "torch")


def _advice(missing):
    installed = [name for name in _TRAIN if _is_installed(name)]
    if asked := os.environ.get("KERAS_BACKEND"):
        found = f"KERAS_BACKEND is {asked!r}, and {missing} is not installed."
    else:
        found = f"Keras looks for {missing}, which is not installed."
    if installed:
        choices = " or ".join(f"KERAS_BACKEND={name}" for name in installed)
        return (
            f"{found} Set {choices}, which is installed, or install it: "
            f"pip install {missing}"
        )
    return (
        f"{found} No other backend is, either: install one, and set "
        f"KERAS_BACKEND to its name: pip install {missing}; "
        f"export KERAS_BACKEND={missing}"
    )


def _is_installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    _missing = (error.name or "").split(".")[0]
    if _missing not in _TRAIN:
        raise
    # This runs before `__main__` does: there is no other place.
    if sys.orig_argv[1:3] == ["-m", "keras_stab"]:
        raise SystemExit(_advice(_missing)) from None
    raise ImportError(_advice(_missing)) from None
