"""What a method may have inside it, and how many gradients a step takes."""

import keras

from keras_stab.nesting import nest
from keras_stab.nesting import whole_nest


def always_updates(optimizer):
    """Whether each `apply` surely is an update, and no wrapper is asked."""
    return (
        type(optimizer).apply is keras.optimizers.Optimizer.apply
        and not hasattr(optimizer, "inner_optimizer")
        and not optimizer.gradient_accumulation_steps
    )


def evaluations_per_step(optimizer):
    """Int, how many gradients one step of the optimizer's method takes.

    Raises:
        ValueError: If the parts of a `MultiOptimizer` differ in it.
    """
    last = None
    for last in nest(optimizer):
        if hasattr(last, "evaluations_per_step"):
            return last.evaluations_per_step
    parts = getattr(last, "optimizers", None) or []
    counts = {part.name: evaluations_per_step(part) for part in parts}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "The optimizers of the players take different numbers of "
            "gradients per step, so no synchronisation fits all of them: "
            f"choose methods that take the same number. Received: {counts}"
        )
    return next(iter(counts.values()), 1)


def refuse_averages_inside(name, optimizer):
    """Raises when an optimizer inside averages weights by itself."""
    for each in whole_nest(optimizer):
        if getattr(each, "use_ema", False) or getattr(
            each, "averages_weights", False
        ):
            raise ValueError(
                f"An average inside {name} would average look-ahead points. "
                f"Put it outside: WeightAveraging({name}(...)). Received: "
                f"inner optimizer {each.name!r} of type {type(each).__name__}"
            )


def refuse_several_evaluations(name, optimizer):
    """Raises when one step of the inner optimizer takes several gradients."""
    count = evaluations_per_step(optimizer)
    if count > 1:
        raise ValueError(
            f"{name} needs an inner optimizer that moves with every gradient, "
            "for example SGD or Adam. Received:"
            f" {type(optimizer).__name__}, which needs {count} per step"
        )


def refuse_accumulating_parts(name, optimizer):
    """Raises when a `MultiOptimizer` inside counts calls, not updates."""
    parts = getattr(optimizer, "optimizers", None) or []
    for part in [each for part in parts for each in nest(part)]:
        if getattr(part, "gradient_accumulation_steps", None):
            raise ValueError(
                f"{name} cannot tell calls from updates of a MultiOptimizer "
                "whose parts accumulate gradients. Use larger "
                f"batches. Received: {part.name!r} with "
                "gradient_accumulation_steps="
                f"{part.gradient_accumulation_steps}"
            )
