"""When the projections of Keras's constraints run."""

import contextlib


@contextlib.contextmanager
def suspended_constraints(variables):
    """Inside, no optimizer projects; yields the constraints, by index."""
    constraints = [variable.constraint for variable in variables]
    try:
        for variable in variables:
            variable.constraint = None
        yield constraints
    finally:
        for variable, constraint in zip(variables, constraints):
            variable.constraint = constraint
