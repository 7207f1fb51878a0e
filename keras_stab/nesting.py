"""Optimizers inside optimizers, one by one."""

import keras


def nest(optimizer):
    """The optimizer and what is inside it, the outermost first."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def whole_nest(optimizer):
    """As `nest`, with the optimizers that a `MultiOptimizer` holds."""
    last = None
    for last in nest(optimizer):
        yield last
    # Only for the innermost, because a wrapper forwards the attribute.
    for part in getattr(last, "optimizers", None) or []:
        yield from whole_nest(part)


def scales_loss(optimizer):
    """Whether a loss scaler looks at the gradients that are handed on."""
    kind = keras.optimizers.LossScaleOptimizer
    return any(isinstance(each, kind) for each in nest(optimizer))


def adds_up(optimizer):
    """Whether it needs no more than shares that replicas add up.

    Under `tf.distribute` Keras clips, accumulates and looks for numbers that
    are not finite before it adds them up. Then they must be alike, or the
    direction would change, and one replica alone would skip the step.
    """
    names = ("clipnorm", "clipvalue", "global_clipnorm")
    names += ("gradient_accumulation_steps",)
    return not scales_loss(optimizer) and not any(
        getattr(each, name, None)
        for each in whole_nest(optimizer)
        for name in names
    )
