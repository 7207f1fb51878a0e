"""Over which axes of which variable the norm of a unit is taken."""

import re

from keras_stab.arguments import checked_count
from keras_stab.numerics.clipping import unit_axes
from keras_stab.object_arguments import checked_pattern

ARGUMENT = "unit_axes"


def checked_unit_axes(axes):
    """A dict from path patterns to lists of axes, or `None`."""
    if axes is None:
        return None
    if not isinstance(axes, dict):
        raise ValueError(
            "`unit_axes` must be a dict from path patterns to axes, for "
            'example {"conv1d": (0, 1), "embeddings": 1}, or None. Received: '
            f"unit_axes={axes!r}"
        )
    found = {}
    for pattern, given in axes.items():
        several = isinstance(given, (list, tuple)) and len(given) > 0
        found[checked_pattern(ARGUMENT, pattern)] = sorted(
            {
                checked_count(ARGUMENT, axis, 0)
                for axis in (given if several else (given,))
            }
        )
    return found


def resolved_axes(patterns, variables):
    """For each variable a tuple of axes, or `None` where it is one unit.

    Raises:
        ValueError: If a pattern matches no variable, or a variable has not
            as many axes.
    """
    chosen = [unit_axes(v.shape) for v in variables]
    for pattern, axes in (patterns or {}).items():
        matching = [
            i for i, v in enumerate(variables) if re.search(pattern, v.path)
        ]
        if not matching:
            paths = ", ".join(v.path for v in variables)
            raise ValueError(
                "A pattern of `unit_axes` matches no variable. Received: "
                f"{pattern!r}; the variables are {paths}"
            )
        for i in matching:
            if max(axes) >= len(variables[i].shape):
                raise ValueError(
                    "`unit_axes` names an axis that a variable does not have. "
                    f"Received: {axes} for {variables[i].path!r} of shape "
                    f"{tuple(variables[i].shape)}"
                )
            chosen[i] = tuple(axes)
    return chosen
