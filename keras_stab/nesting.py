"""Optimizers inside optimizers, looked at one by one."""


def nest(optimizer):
    """The optimizer and what is inside it, the outermost first."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def whole_nest(optimizer):
    """As `nest`, with the several optimizers that a `MultiOptimizer` holds."""
    for each in nest(optimizer):
        yield each
        for part in getattr(each, "optimizers", None) or []:
            yield from whole_nest(part)
