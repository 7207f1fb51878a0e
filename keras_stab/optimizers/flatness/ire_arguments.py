"""Checks of the arguments of IRE."""

import keras

from keras_stab.arguments import checked_count
from keras_stab.backend import devices
from keras_stab.nesting import nest
from keras_stab.object_arguments import checked_function
from keras_stab.optimizers.flatness.second_moment import WITH_SECOND_MOMENT
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.lent_weights import LendsWeights
from keras_stab.optimizers.nest_checks import always_updates
from keras_stab.optimizers.wrapper import innermost

CURVATURES = ("fisher", "second_moment", "gradient")


def checked_sampler(value, curvature):
    """A function that draws labels, its config, or `None`."""
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if value is None:
        return value
    checked_function("label_sampler", value, ("outputs", "seed"))
    if curvature != "fisher":
        raise ValueError(
            '`label_sampler` has an effect with curvature="fisher" only. '
            f"Received: curvature={curvature!r}"
        )
    return value


def first_step(start_step, inner):
    """The first boosted update; `None` where it is not known yet."""
    if not isinstance(start_step, str):
        return checked_count("start_step", start_step, 0)
    if start_step == "manual":
        return None
    if start_step != "warmup_end":
        raise ValueError(
            '`start_step` must be an integer, "warmup_end" or "manual". '
            f"Received: start_step={start_step!r}"
        )
    rate = innermost(inner).get_config()["learning_rate"]
    arguments = rate["config"] if isinstance(rate, dict) else {}
    if not arguments.get("warmup_steps"):
        raise ValueError(
            'start_step="warmup_end" needs an inner optimizer whose learning '
            "rate is a schedule with `warmup_steps`. Pass the step itself"
        )
    return int(arguments["warmup_steps"])


def check_inner(optimizer, curvature, momentum):
    """Raises a `ValueError` for an inner optimizer that cannot be used."""
    base = innermost(optimizer)
    if getattr(base, "use_ema", False):
        raise ValueError(
            "`use_ema` of the inner optimizer would average weights that are "
            "not boosted. Average outside of IRE instead"
        )
    if type(base).__name__ == "ScheduleFreeAdamW":
        raise ValueError(
            "ScheduleFreeAdamW makes the weights from its own state, which "
            "would undo the boost. Use another inner optimizer"
        )
    for each in nest(optimizer):
        if isinstance(each, LendsWeights) or getattr(
            each, "averages_weights", False
        ):
            name = type(each).__name__
            wraps = hasattr(each, "inner_optimizer")
            advice = (
                f"Put it outside, {name}(IRE(...))"
                if wraps
                else "Use another inner optimizer"
            )
            raise ValueError(
                f"{name} keeps a second set of weights, which would not be "
                f"boosted. {advice}"
            )
    if any(hasattr(each, "start_boost") for each in nest(optimizer)):
        raise ValueError("IRE inside IRE would boost twice: use one")
    if curvature != "second_moment":
        return
    if momentum:
        raise ValueError(
            'curvature="second_moment" is an average already: leave '
            f"`curvature_momentum` 0. Received: curvature_momentum={momentum}"
        )
    if not isinstance(base, WITH_SECOND_MOMENT):
        names = ", ".join(kind.__name__ for kind in WITH_SECOND_MOMENT[:-1])
        raise ValueError(
            'curvature="second_moment" reads the running average of squared '
            f"gradients that {names} keep. Use curvature="
            f'"gradient" with {type(base).__name__}'
        )


def refuse_fisher_on_replicas():
    """Raises under a strategy with several replicas."""
    if devices.replicas() > 1:
        raise ValueError(
            'curvature="fisher" cannot run under a tf.distribute strategy, '
            "which allows no exchange between replicas inside a condition. "
            'Use curvature="second_moment", or "gradient", which exchanges '
            f"gradients at every step. Received: {devices.replicas()} replicas"
        )


def always_moves(optimizer):
    """Whether each of its updates moves the weights, seen without asking.

    Not through a loss scaler, which drops some, nor where gradients of several
    batches make one update.
    """
    *outer, base = nest(optimizer)
    return (
        always_updates(base)
        and all(isinstance(each, GradientMethod) for each in outer)
        and not any(getattr(each, "across", None) for each in outer)
    )
