"""What `Game.compile` makes of the optimizer that it is given."""

import keras

from keras_stab.backend import devices
from keras_stab.games.player_optimizers import JointOptimizer
from keras_stab.games.player_optimizers import PlayerOptimizers
from keras_stab.nesting import nest
from keras_stab.nesting import whole_nest
from keras_stab.object_arguments import checked_optimizer
from keras_stab.optimizers.flatness.ire import IRE
from keras_stab.optimizers.gradient_method import GradientMethod
from keras_stab.optimizers.nest_checks import evaluations_per_step
from keras_stab.optimizers.updates_together import UpdatesTogether
from keras_stab.optimizers.wrapper import Wrapper
from keras_stab.optimizers.wrapper import innermost


def prepared(optimizer, owned, turns):
    """The optimizer to compile a game with.

    Args:
        optimizer: As in `Game.compile`.
        owned: Dict: name of each player to a list of its variables.
        turns: `None`, or the players' names in the order of their turns.
    """
    if isinstance(optimizer, dict) and "class_name" not in optimizer:
        optimizer = PlayerOptimizers(optimizer)
    optimizer = checked_optimizer("optimizer", optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = prepared(optimizer.inner_optimizer, owned, turns)
        if inner is not optimizer.inner_optimizer:
            optimizer.inner_optimizer = inner
        return optimizer
    _check_methods(optimizer)
    _check_parts(optimizer)
    if per_player(optimizer) is None:
        if turns:
            optimizer = _one_each(optimizer, owned)
        else:
            _check_joint(optimizer)
    if per_player(optimizer) is not None:
        per_player(optimizer).bind(owned, turns)
    guarded = (Wrapper, PlayerOptimizers, UpdatesTogether)
    if isinstance(optimizer, guarded):
        return optimizer
    return JointOptimizer(optimizer)


def per_player(optimizer):
    """The `PlayerOptimizers` in a nest, or `None`."""
    for each in whole_nest(optimizer):
        if isinstance(each, PlayerOptimizers):
            return each
    return None


def show_rates(optimizer):
    """Lets Keras's callbacks find the players' rates in a loss scaler.

    They look for an attribute that a `LossScaleOptimizer` does not forward.
    """
    players = per_player(optimizer)
    for each in nest(optimizer):
        scaler = isinstance(each, keras.optimizers.LossScaleOptimizer)
        if scaler and players is not None:
            each.optimizers = players.optimizers


def refuse_arguments(given, players):
    """Raises a `ValueError` for `compile` arguments of plain models only.

    Args:
        given: Dict of the arguments.
        players: List of `Player`.
    """
    for argument, value in given.items():
        if value is None:
            continue
        if argument in ("loss", "loss_weights"):
            part = "loss" if argument == "loss" else "weight"
            advice = (
                f"A game has no `{argument}` of its own, since each player has "
                f"a {part}: Player({players[0].name!r}, variables, loss=..., "
                "weight=...)"
            )
        elif argument in ("metrics", "weighted_metrics"):
            advice = (
                f"A game takes no `{argument}`: it logs the players' losses. "
                "Hand a metric to Game(parts={'<name>': metric}) and update it "
                "in the loss of a player"
            )
        else:
            advice = (
                f"`Game.compile` takes no argument `{argument}`. It takes "
                "`optimizer`, `run_eagerly`, `steps_per_execution`, "
                "`jit_compile` and `auto_scale_loss`"
            )
        raise ValueError(f"{advice}. Received: {argument}={value!r}")


def refuse_replicas():
    """Raises a `ValueError` under a strategy of several replicas."""
    if devices.replicas() > 1:
        raise ValueError(
            "A Game does not run under a tf.distribute strategy of several "
            f"replicas. Received: {devices.replicas()} replicas"
        )


def check_norm_of_scaled(optimizer):
    """Raises a `ValueError` where `operator_norm=True` would underflow."""
    for each in nest(optimizer):
        if isinstance(each, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`operator_norm=True` takes gradients before a "
                "LossScaleOptimizer scales them, so they underflow in float16. "
                "Leave it out, or use mixed_bfloat16. Received: optimizer "
                f"{each.name!r} of type LossScaleOptimizer"
            )


def _check_methods(optimizer):
    for each in whole_nest(optimizer):
        if isinstance(each, (GradientMethod, IRE)):
            raise ValueError(
                f"{type(each).__name__} does not work in a Game: it computes "
                "its own gradients, of one loss that all weights share, and "
                "a game has none. Use an optimizer, RAPP, CEGPlus, or one "
                "inside ExtraGradient, OptimisticGradient, Lookahead or "
                f"WeightAveraging. Received: {each.name!r}"
            )


def _check_parts(optimizer):
    """Checks the parts of a `MultiOptimizer`, even one that is not ours."""
    for part in getattr(innermost(optimizer), "optimizers", None) or []:
        for each in nest(part):
            if getattr(each, "moves_jointly", False):
                kind = type(each).__name__
                raise ValueError(
                    f'{kind}(alpha="adaptive") takes inner products over the '
                    "weights of all players; with those of one player alone it "
                    "is another method. Compile the game with one joint "
                    f'{kind}, optimizer={kind}(alpha="adaptive"), or give '
                    f"alpha as a number. Received: {each.name!r} as one of "
                    "several optimizers"
                )


def _check_joint(optimizer):
    for each in whole_nest(optimizer):
        if getattr(each, "global_clipnorm", None) is not None:
            raise ValueError(
                "`global_clipnorm` of a joint optimizer would scale the "
                "gradient of one player by the size of the others'. Give each "
                "player an optimizer of its own: "
                "compile(optimizer={'<player>': ...}), each with "
                f"global_clipnorm. Received: {each.global_clipnorm}"
            )


def _one_each(optimizer, owned):
    """A copy of a plain optimizer for each player, who take turns."""
    names = ", ".join(f"{name!r}: ..." for name in owned)
    kind = type(optimizer).__name__
    joint = (Wrapper, keras.optimizers.MultiOptimizer)
    if isinstance(optimizer, joint) or evaluations_per_step(optimizer) > 1:
        raise ValueError(
            f"{kind} moves all players together, but in this game they take "
            f"turns. Give each player its own, optimizer={{{names}}}, or put "
            f"a wrapper around them: {kind}(PlayerOptimizers({{{names}}})). "
            f'Or use turns="simultaneous". Received: {optimizer.name!r}'
        )
    if optimizer.built:
        raise ValueError(
            "Players who take turns each get a copy of the optimizer, and "
            f"this {kind} was already built. Give a new one, or one for each "
            f"player: optimizer={{{names}}}. Received: {optimizer.name!r}"
        )
    return PlayerOptimizers(
        {name: _copy(optimizer, name) for name in owned},
    )


def _copy(optimizer, player):
    config = optimizer.get_config()
    config["name"] = f"{optimizer.name}_{player}"
    return type(optimizer).from_config(config)
