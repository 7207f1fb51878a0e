"""Optimizers inside optimizers, looked at one by one."""


def nest(optimizer):
    """The optimizer and what is inside it, the outermost first."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def whole_nest(optimizer):
    """As `nest`, with the several optimizers that a `MultiOptimizer` holds."""
    last = None
    for last in nest(optimizer):
        yield last
    # Of the innermost only: a wrapper shows those of the one inside it.
    for part in getattr(last, "optimizers", None) or []:
        yield from whole_nest(part)
