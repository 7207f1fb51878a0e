"""Packages that only some of the diagnostics need."""

import importlib


def extra(module, purpose, group="report"):
    """Imports a module of an optional package, or says how to get it.

    Args:
        module: String, such as `"scipy.stats"`.
        purpose: String, what needs it.
        group: String, the extra of `keras-stab` that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{purpose} needs {package}, which is not installed. Install it "
            f'with: pip install "keras-stab[{group}]"'
        ) from error
