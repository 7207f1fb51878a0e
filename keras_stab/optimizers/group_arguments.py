"""Checks of the arguments of methods of groups, and of what is inside."""

import inspect
import warnings

import keras

from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_count
from keras_stab.backend import exchange
from keras_stab.gradients.by_loss import LOSSES
from keras_stab.gradients.grouping import RULES
from keras_stab.nesting import nest
from keras_stab.numerics.min_norm import MAX_GROUPS
from keras_stab.object_arguments import checked_function
from keras_stab.optimizers.wrapper import innermost


def checked_groups(groups, across, default):
    """`groups`, or what `None` stands for."""
    if groups is None:
        return 1 if across == "replicas" else default
    if isinstance(groups, str):
        if groups == LOSSES:
            return LOSSES
        raise ValueError(
            f'`groups` must be an integer from 1 to {MAX_GROUPS} or "{LOSSES}" '
            f"(one for each loss of `compile`). Received: groups={groups!r}"
        )
    return checked_count("groups", groups, 1, MAX_GROUPS)


def check_losses_alone(across, engine, grouping):
    """Refuses what says how to split rows, where no rows are split."""
    for argument, value, usual in (
        ("across", across, None),
        ("engine", engine, "auto"),
        ("grouping", grouping, None),
    ):
        if value != usual:
            raise ValueError(
                f'With groups="losses" every group has all rows of a batch, '
                "also those on other devices, and its gradient comes from one "
                f"forward pass: leave `{argument}` out. Received: "
                f"{argument}={value!r}"
            )


def checked_rule(rule, names):
    """The name of a rule, or a function that may have come as a config."""
    if isinstance(rule, dict):
        rule = keras.saving.deserialize_keras_object(rule)
    if not callable(rule):
        return checked_choice("rule", rule, tuple(names))
    if asks_for_sizes(rule):
        return checked_function("rule", rule, ("gram", "sizes"))
    return checked_function("rule", rule, ("gram",))


def check_used(argument, value, rule, user):
    """Refuses an argument that another rule has."""
    if value is not None and rule != user:
        raise ValueError(
            f"`{argument}` has an effect with rule={user!r} only: leave it "
            f"out. Received: {argument}={value!r} with rule={rule!r}"
        )


def asks_for_sizes(rule):
    """Whether a function takes the rows in each group too."""
    try:
        return "sizes" in inspect.signature(rule).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return False


def checked_grouping(grouping, across):
    """`grouping`, or what `None` stands for."""
    if grouping is None:
        return "contiguous" if across == "replicas" else "interleaved"
    checked_choice("grouping", grouping, RULES)
    if across == "replicas" and grouping != "contiguous":
        raise ValueError(
            'With across="replicas" a group is a block of the successive rows '
            'that a device has: leave `grouping` out, or use "contiguous". For '
            "groups whose rows are spread over all devices leave `across` "
            f"out. Received: grouping={grouping!r}"
        )
    if across == "batches" and grouping != "interleaved":
        raise ValueError(
            '`grouping` says how to split one batch; with across="batches" '
            "nothing is split. Leave it out. Received: "
            f"grouping={grouping!r}"
        )
    return grouping


def checked_total(groups, across):
    """K, the groups on all devices."""
    if across != "replicas":
        return groups
    shares = exchange.batch_shares()
    if groups * shares > MAX_GROUPS:
        raise ValueError(
            f"At most {MAX_GROUPS} groups are solved for, over all devices. "
            f'Use fewer `groups` for each replica, or leave across="replicas" '
            "out, where the number of groups does not depend on that of the "
            f"devices. Received: groups={groups} on each of {shares} devices"
        )
    return groups * shares


def total_now(built, groups, across):
    """The same, of an optimizer whose state was `built` for a number of them.

    Args:
        built: Int, or `None` before it was built.
    """
    if built and across == "replicas" and exchange.batch_shares() > 1:
        total = checked_total(groups, across)
        if total != built:
            raise ValueError(
                "The optimizer was built for another number of devices: set "
                "the distribution or make the process group first, then the "
                "model and the optimizer. Received: a state of "
                f"{built} groups for {total}"
            )
    return built or checked_total(groups, across)


def check_saved_total(name, saved, total, across):
    """Refuses the state of another number of groups, and says why."""
    if saved == total:
        return
    reason = "make it with the `groups` that the saved one had"
    if across == "replicas":
        reason = (
            'with across="replicas" their number is `groups` times that of '
            f"the devices, now {exchange.batch_shares()}. Train on as many "
            "devices as before or with other `groups`, so that the product is "
            'the same; or on one device with grouping="contiguous" and '
            f"groups={saved}"
        )
    raise ValueError(
        f"The saved state of {name} does not fit: {reason}. Received: a "
        f"state of {saved} groups, expected {total}"
    )


def check_inner(name, inner, across, engine):
    """Refuses, or warns of, an inner optimizer that `name` cannot serve."""
    if across == "batches" and engine != "auto":
        raise ValueError(
            '`engine` says how to split one batch; with across="batches" '
            'nothing is split. Leave engine="auto". Received: '
            f"engine={engine!r}"
        )
    for optimizer in nest(inner):
        if getattr(optimizer, "wants_oracle", False):
            raise ValueError(
                f"The optimizer inside {name} must take plain gradients. Put "
                f"{name} inside the other method, for example "
                f"Other({name}(...)). Received: inner optimizer "
                f"{optimizer.name!r} of type {type(optimizer).__name__}"
            )
        steps = getattr(optimizer, "gradient_accumulation_steps", None)
        if across == "batches" and steps:
            raise ValueError(
                'across="batches" already makes one update from several '
                "batches. Remove `gradient_accumulation_steps` from the inner "
                f"optimizer. Received: gradient_accumulation_steps={steps}"
            )
    for clipping in ("clipnorm", "clipvalue"):
        if getattr(innermost(inner), clipping, None):
            warnings.warn(
                f"`{clipping}` of the inner optimizer changes the direction "
                f"after {name}, which may then conflict with a group. "
                "`global_clipnorm` keeps the direction.",
                stacklevel=4,
            )
