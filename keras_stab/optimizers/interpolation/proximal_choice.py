"""Which proximal operator acts on which variable."""

import re

import keras

from keras_stab.constraints import ConvexSet
from keras_stab.constraints import is_convex
from keras_stab.object_arguments import checked_function
from keras_stab.object_arguments import checked_pattern


class _Projection(ConvexSet):
    """A constraint that is not one of ours, taken for a projection."""

    def __init__(self, constraint):
        self.constraint = constraint

    def project(self, value):
        return self.constraint(value)


def checked_proximal(proximal):
    """The argument, if it is `None`, an operator, or a dict of them."""
    operators = proximal if isinstance(proximal, dict) else {"": proximal}
    for pattern, operator in operators.items():
        if not _is_operator(operator) and proximal is not None:
            raise ValueError(
                "`proximal` must be None, an operator or constraint of "
                "keras_stab.constraints, or a dict from regular expressions "
                f"for paths to these. Received: proximal={proximal!r}"
            )
        checked_pattern("proximal", pattern)
        if callable(operator) and not hasattr(operator, "proximal"):
            checked_function("proximal", operator, ("value",))
    return proximal


def _is_operator(operator):
    """Classes and Keras's regularizers are callable, but not projections."""
    if isinstance(operator, (type, keras.regularizers.Regularizer)):
        return False
    return hasattr(operator, "proximal") or callable(operator)


def operators_of(kind, proximal, variables):
    """The operator of every variable, or `None`."""
    given = {} if proximal is None else proximal
    if not isinstance(given, dict):
        given = {"": given}
    unused = dict.fromkeys(given)
    operators = []
    for variable in variables:
        matching = [p for p in given if re.search(p, variable.path)]
        for pattern in matching:
            unused.pop(pattern, None)
        if len(matching) > 1 or (matching and variable.constraint):
            raise ValueError(
                f"{variable.path!r} has more than one proximal operator or "
                "constraint. Applied in turn they are not a proximal "
                "operator: keep one of them. Received: "
                f"patterns {matching}, constraint {variable.constraint!r}"
            )
        operator = given[matching[0]] if matching else variable.constraint
        operators.append(_as_operator(kind, operator, variable))
    if unused:
        paths = ", ".join(variable.path for variable in variables)
        raise ValueError(
            "A pattern of `proximal` matches no variable. Received: "
            f"{next(iter(unused))!r}; the variables are {paths}"
        )
    return operators


def _as_operator(kind, operator, variable):
    if not is_convex(operator):
        raise ValueError(
            f"{kind} needs convex sets, and that of {type(operator).__name__} "
            "is not convex: the method moves between feasible points, and so "
            "could leave it. Take a set of keras_stab.constraints, for example "
            f"L2Ball. Received: a constraint on {variable.path!r}"
        )
    if operator is None or hasattr(operator, "proximal"):
        return operator
    return _Projection(operator)
