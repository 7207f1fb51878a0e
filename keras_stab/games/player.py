"""Player: who owns which variables, and what for."""

import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_number
from keras_stab.registration import registered


@registered
class Player:
    r"""One player of a `Game`: its name, its variables and its loss.

    Args:
        name: String. The log shows the loss as `<name>_loss`.
        variables: What the player moves: a layer, a model or a
            `keras.Variable`, or a list of these. Layers must be built. Frozen
            variables stay where they are.
        loss: The player's loss. Called as `loss(batch, training)` with what
            `fit` was given (`x`, or `(x, y)`, or `(x, y, sample_weight)`), it
            returns a scalar. With a parameter named `game` it is called as
            `loss(batch, training, game=game)`. Regularizers of the player's
            weights are added to what it descends on, not to the log.
        sense: `"min"` or `"max"`: whether the player wants the loss small or
            large. Logs show the loss as it is. Defaults to `"min"`.
        weight: Float above 0, by which the loss is multiplied in the joint
            field; logs are without it. Defaults to `1.0`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If `loss` cannot be called, or `variables` holds something
            else.

    Example:

    >>> import keras, keras_stab
    >>> x = keras.Variable(1.0, name="x")
    >>> player = keras_stab.Player("x", x, lambda batch, training: x * x)
    >>> player.sense
    'min'
    """

    def __init__(
        self,
        name: str,
        variables: Any,
        loss: Callable[..., Any],
        sense: str = "min",
        weight: float = 1.0,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(
                "`name` of a player must be a non-empty string. "
                f"Received: name={name!r}"
            )
        _check_loss(name, loss)
        self.name = name
        self.pieces = _as_list(variables)
        if not self.pieces:
            raise ValueError(
                f"`variables` of player {name!r} must not be empty: name the "
                "layers or variables that the player moves. Received: "
                f"variables={variables!r}"
            )
        for piece in self.pieces:
            self._check(piece)
        self.loss = loss
        self.sense = checked_choice("sense", sense, ("min", "max"))
        self.weight = checked_number("weight", weight, above=0.0)
        self._takes_game = "game" in (_parameters(loss) or ())

    def _check(self, piece):
        known = (keras.layers.Layer, keras.Variable)
        if not isinstance(piece, known):
            raise TypeError(
                f"`variables` of player {self.name!r} must be layers, models "
                f"or keras.Variables. Received: {piece!r}"
            )
        if isinstance(piece, keras.layers.Layer) and not _is_built(piece):
            raise ValueError(
                f"The layer {piece.name!r} of player {self.name!r} is not "
                "built, so that its variables are not known: begin a "
                "Sequential model with keras.Input(shape), or call "
                "`layer.build(shape)` before the Player is made. Received: "
                f"variables={self.pieces!r}"
            )

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables of the player, those that are frozen too."""
        found = {}
        for piece in self.pieces:
            layer = isinstance(piece, keras.layers.Layer)
            for variable in piece.variables if layer else [piece]:
                found[id(variable)] = variable
        return list(found.values())

    @property
    def sign(self) -> float:
        """1 for a minimiser, -1 for a maximiser."""
        return 1.0 if self.sense == "min" else -1.0

    def evaluate(self, batch: Any, training: bool, game: Any) -> Any:
        """The player's own loss: what `loss` returns."""
        if self._takes_game:
            return self.loss(batch, training, game=game)
        return self.loss(batch, training)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "variables": keras.saving.serialize_keras_object(list(self.pieces)),
            "loss": keras.saving.serialize_keras_object(self.loss),
            "sense": self.sense,
            "weight": self.weight,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> "Player":
        config = dict(config)
        for key in ("variables", "loss"):
            config[key] = keras.saving.deserialize_keras_object(
                config[key], custom_objects=custom_objects
            )
        return cls(**config)


def _check_loss(name, loss):
    """Raises a `TypeError` for what cannot be called as a player's loss."""
    wanted = (
        f"The loss of player {name!r} must be a function "
        "`loss(batch, training)`, or `loss(batch, training, game)`, that "
        "returns a scalar"
    )
    given = f"Received: loss={loss!r}"
    if isinstance(loss, (str, keras.losses.Loss)):
        raise TypeError(
            f"{wanted}, and not a loss of Keras, which compares labels with "
            f"outputs: call that one inside the function. {given}"
        )
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(f"{wanted}. {given}")
    parameters = _parameters(loss)
    if parameters is None:
        return
    more = {"game": None} if "game" in parameters else {}
    try:
        inspect.signature(loss).bind(None, True, **more)
    except TypeError as error:
        named = ", ".join(parameters)
        raise TypeError(
            f"{wanted}: {error}. `training` is True in `fit` and False in "
            "`evaluate`; write the parameter even where the loss does not use "
            f"it. {given} with parameters ({named})"
        ) from error


def _as_list(variables):
    if isinstance(variables, (list, tuple)):
        return list(variables)
    return [variables]


def _is_built(layer):
    inside = [layer, *getattr(layer, "layers", [])]
    return all(each.built for each in inside)


def _parameters(function):
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables written in C
        return None
