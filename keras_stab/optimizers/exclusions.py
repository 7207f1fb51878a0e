"""Which variables a rule leaves out: by dimension, path pattern or object."""

import re

import keras

from keras_stab.object_arguments import checked_pattern


def as_patterns(argument, excluded):
    """Path patterns from patterns and variables, for a config; or `None`."""
    if excluded is None:
        return None
    if isinstance(excluded, str) or not isinstance(excluded, (list, tuple)):
        raise ValueError(
            f"`{argument}` must be a list of path patterns or variables, or "
            f"None. Received: {argument}={excluded!r}"
        )
    patterns = []
    for item in excluded:
        if isinstance(item, keras.Variable):
            patterns.append(f"^{re.escape(item.path)}$")
        elif isinstance(item, str):
            patterns.append(checked_pattern(argument, item))
        else:
            raise ValueError(
                f"`{argument}` must hold strings or variables. Received: "
                f"{item!r} of type {type(item).__name__}"
            )
    return patterns


def excluded_variables(argument, patterns, exclude_1d, variables):
    """One boolean per variable.

    Args:
        argument: Name for messages.
        patterns: Regular expressions, searched for in the variables' paths;
            `None` for the rule of dimensions.
        exclude_1d: Whether that rule leaves out variables of at most one
            dimension (biases, scales).
        variables: The variables that the optimizer was built with.

    Raises:
        ValueError: If a pattern matches no variable.
    """
    if patterns is None:
        return [exclude_1d and len(v.shape) <= 1 for v in variables]
    for pattern in patterns:
        if not any(re.search(pattern, v.path) for v in variables):
            paths = ", ".join(v.path for v in variables)
            raise ValueError(
                f"A pattern of `{argument}` matches no variable. Received: "
                f"{pattern!r}; the variables are {paths}"
            )
    return [
        any(re.search(pattern, v.path) for pattern in patterns)
        for v in variables
    ]
