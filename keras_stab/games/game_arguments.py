"""What a `Game` is made of: checks of its arguments."""

import inspect

import keras

from keras_stab.games.player import Player


def checked_players(players):
    """The players as a tuple, if they are valid."""
    listed = isinstance(players, (list, tuple)) and len(players) > 0
    if not listed or not all(isinstance(p, Player) for p in players):
        raise ValueError(
            "`players` must be a list of keras_stab.Player, not empty. "
            f"Received: players={players!r}"
        )
    return tuple(players)


def checked_parts(parts):
    """The parts, a dict, if a game can keep them."""
    known = (
        keras.layers.Layer,
        keras.Variable,
        keras.metrics.Metric,
        keras.random.SeedGenerator,
    )
    parts = {} if parts is None else parts
    named = isinstance(parts, dict) and all(isinstance(k, str) for k in parts)
    if not named or not all(isinstance(p, known) for p in parts.values()):
        raise ValueError(
            "`parts` must be None or a dict from names to layers, variables, "
            f"metrics and SeedGenerators. Received: parts={parts!r}"
        )
    return dict(parts)


def checked_turns(turns, players):
    """The turns, if each of the named players has one."""
    names = [player.name for player in players]
    if len(set(names)) < len(names):
        raise ValueError(
            f"The players must have different names. Received: {names}"
        )
    if isinstance(turns, str) and turns == "simultaneous":
        return turns
    right = isinstance(turns, (list, tuple)) and set(turns) == set(names)
    if not right:
        raise ValueError(
            '`turns` must be "simultaneous" or a tuple of players\' names in '
            "which every player has a turn, for example "
            f"{tuple(names)}. Received: turns={turns!r}"
        )
    return tuple(turns)


def named_layer(name, pieces, parts):
    """The layer of that name, of a player or of `parts`."""
    layers = {
        piece.name: piece
        for piece in [*pieces, *parts.values()]
        if isinstance(piece, keras.layers.Layer)
    }
    layers.update(
        (key, part)
        for key, part in parts.items()
        if isinstance(part, keras.layers.Layer)
    )
    if not isinstance(name, str) or name not in layers:
        raise ValueError(
            "`predict_with` must be the name of a layer of a player or of "
            f"`parts`. Received: predict_with={name!r}, known layers: "
            f"{sorted(layers)}"
        )
    return layers[name]


def owners(players):
    """Dict: the id of each variable to the player that it belongs to."""
    found = {}
    for player in players:
        for variable in player.variables:
            other = found.setdefault(id(variable), player)
            if other is not player:
                raise ValueError(
                    f"The variable {variable.path!r} belongs to player "
                    f"{other.name!r} and to player {player.name!r}: give "
                    "every layer to one player. Players may share a loss, not "
                    f"weights. Received: {[p.name for p in players]}"
                )
    return found


def check_serialisable(game, player):
    """Raises when a player cannot be saved with the game."""
    loss = player.loss
    named = inspect.isfunction(loss) and "<" not in loss.__qualname__
    if inspect.ismethod(loss) or (inspect.isfunction(loss) and not named):
        raise NotImplementedError(
            f"{type(game).__name__} cannot be saved with its configuration: "
            f"the loss of player {player.name!r} is a method, or a function "
            "made inside another one. Register a function of a module with "
            "keras.saving.register_keras_serializable that finds its layers "
            "by the argument `game` (game.get_layer(name)), or write a "
            "subclass of Game with `get_config`, or use `save_weights`"
        )
    for piece in player.pieces:
        if isinstance(piece, keras.Variable):
            raise NotImplementedError(
                f"{type(game).__name__} cannot be saved with its "
                f"configuration: player {player.name!r} owns the variable "
                f"{piece.path!r} outside of any layer. Put it into a layer, "
                "or use `save_weights`"
            )
