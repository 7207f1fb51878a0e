"""Optimizers of a game: one for each player, or one behind a barrier."""

import math
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.backend import tracing
from keras_stab.backend import updates
from keras_stab.object_arguments import checked_optimizer
from keras_stab.optimizers.nest_checks import evaluations_per_step
from keras_stab.optimizers.state import add_state
from keras_stab.optimizers.wrapper import Wrapper
from keras_stab.optimizers.wrapper import innermost
from keras_stab.optimizers.wrapper import refuse_built_elsewhere
from keras_stab.registration import registered


@registered
class JointOptimizer(Wrapper):
    """Changes nothing but the order of operations, which TensorFlow needs.

    In TensorFlow's graph mode an assignment can overtake the read of a
    variable by the gradient of another one, and in a game most gradients do
    not depend on their own variable. `Game.compile` puts optimizers that have
    no barrier against this into the wrapper, which has one.
    """


class _ByPlayer:
    """The map from variables to optimizers that `MultiOptimizer` takes."""

    def __init__(self, optimizers):
        self._optimizers = list(optimizers.values())
        self.position = {}

    def values(self):
        return self._optimizers

    def __call__(self, variable):
        if id(variable) not in self.position:
            raise ValueError(
                f"No player owns the variable {variable.path}: compile a "
                "`keras_stab.Game` with this optimizer"
            )
        return self._optimizers[self.position[id(variable)]]


@registered
class PlayerOptimizers(keras.optimizers.MultiOptimizer):
    """One optimizer for each player of a `Game`.

    `Game.compile(optimizer={"D": ..., "G": ...})` makes one. Write it out to
    put a method around all players together: with
    `Lookahead(PlayerOptimizers({...}))` all players return to their slow
    weights at the same moment.

    Args:
        optimizers: Dict: name of a player to an optimizer, its name or its
            config.
        name: String or `None`.

    Raises:
        ValueError: If two players are given the same object, or one a
            `LossScaleOptimizer` or `MultiOptimizer`.

    Example:

    >>> from keras_stab.games import PlayerOptimizers
    >>> optimizer = PlayerOptimizers({"D": "adam", "G": "sgd"})
    >>> [type(each).__name__ for each in optimizer.optimizers]
    ['Adam', 'SGD']
    """

    def __init__(
        self,
        optimizers: dict[str, str | dict | keras.optimizers.Optimizer],
        name: str | None = None,
    ) -> None:
        if not isinstance(optimizers, dict) or not optimizers:
            raise ValueError(
                "`optimizers` must name the players of a game, as a dict with "
                "one optimizer for each name. Received: "
                f"optimizers={optimizers!r}"
            )
        optimizers = {
            player: checked_optimizer(f"optimizers[{player!r}]", optimizer)
            for player, optimizer in optimizers.items()
        }
        for player, optimizer in optimizers.items():
            _check_part(player, optimizer)
        if len({id(o) for o in optimizers.values()}) < len(optimizers):
            raise ValueError(
                "Two players were given the same optimizer object, whose "
                "state they would share: make one for each player. Received: "
                f"one for {list(optimizers)}"
            )
        by_player = _ByPlayer(optimizers)
        super().__init__(by_player, name=name)
        self._by_player = by_player
        self.by_player: dict[str, keras.optimizers.Optimizer] = optimizers
        self.turns: list[int] | None = None
        self.turn: Any = None

    def bind(
        self,
        owned: dict[str, list[keras.Variable]],
        turns: tuple[str, ...] | None = None,
    ) -> None:
        """Sets the players' variables; `Game.compile` calls this.

        Args:
            owned: Dict: name of each player to a list of its variables.
            turns: `None`, or the players' names in the order of their turns.
        """
        if set(owned) != set(self.by_player):
            raise ValueError(
                "One optimizer is needed for each player of the game. "
                f"Received: optimizers for {sorted(self.by_player)}, players "
                f"{sorted(owned)}"
            )
        names = list(self.by_player)
        position = {
            id(variable): names.index(name)
            for name, variables in owned.items()
            for variable in variables
        }
        order = [names.index(name) for name in turns] if turns else None
        if self.built and (position, order) != (
            self._by_player.position,
            self.turns,
        ):
            raise ValueError(
                "This optimizer was built for other variables or other turns: "
                "compile with a new one"
            )
        windows = {
            innermost(o).gradient_accumulation_steps
            for o in self.by_player.values()
        }
        if windows != {None} and (order or len(windows) > 1):
            raise ValueError(
                "`gradient_accumulation_steps` must be the same for all "
                "players, and None when they take turns. Received: "
                f"{windows}"
            )
        self._by_player.position, self.turns = position, order

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        for optimizer in self.by_player.values():
            own = [v for v in variables if self._by_player(v) is optimizer]
            refuse_built_elsewhere(optimizer, own)
        super().build(variables)
        if self.turns:
            self.turn = add_state(self, "turn")

    @property
    def iterations(self) -> keras.Variable:
        """Real updates of the players; with turns, the number of turns."""
        if self.turns:
            return super().iterations
        return next(iter(self.by_player.values())).iterations

    @property
    def evaluations_per_step(self) -> int:
        """How many gradients it takes until every player made a whole step."""
        rounds = 1
        order = self.turns or range(len(self.by_player))
        for i, optimizer in enumerate(self.by_player.values()):
            needed = evaluations_per_step(optimizer)
            share = list(order).count(i)
            rounds = math.lcm(rounds, needed // math.gcd(needed, share))
        return rounds * (len(self.turns) if self.turns else 1)

    def player_on_turn(self, turn: Any) -> Any:
        """The position of the player whose turn it is.

        Args:
            turn: Integer tensor, the value of the variable `turn`.
        """
        order = keras.ops.convert_to_tensor(self.turns, dtype="int32")
        return keras.ops.take(order, turn)

    def apply_gradients(self, grads_and_vars: Any) -> keras.Variable:
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        grads = list(grads)
        if not grads:
            return
        if not self.built:
            self.build(trainable_variables)
        variables = keras_internals.built_variables(self)
        if trainable_variables is None:
            trainable_variables = variables
        trainable_variables = list(trainable_variables)
        if len(grads) != len(trainable_variables):
            raise ValueError(
                "One gradient is needed for each variable of the game. "
                f"Received: {len(grads)} gradients for "
                f"{len(trainable_variables)} variables"
            )
        grads = updates.barrier(grads)
        parts: list[tuple[list, list]] = [([], []) for _ in self.by_player]
        position = keras_internals.positions(self)
        # Fewer than at `compile` when layers were frozen since.
        for gradient, variable in zip(grads, trainable_variables):
            index = position.get(keras_internals.variable_key(self, variable))
            if index is None:
                raise ValueError(
                    "A variable that can be trained now could not when the "
                    "game was compiled: compile again, with new optimizers. "
                    f"Received: variable {variable.path!r}"
                )
            part = parts[self._by_player.position[id(variables[index])]]
            part[0].append(gradient)
            part[1].append(variables[index])
        on_turn = None
        if self.turns:
            on_turn = self.player_on_turn(tracing.read(self.turn))
        for i, optimizer in enumerate(self.by_player.values()):
            gradients, own = parts[i]
            if not own:
                continue
            if on_turn is None:
                updates.apply_gradients(optimizer, gradients, own)
                continue
            updates.apply_gradients_if(
                keras.ops.equal(on_turn, i),
                optimizer,
                lambda gradients=gradients: gradients,
                own,
            )
        super().iterations.assign_add(1)
        if self.turns:
            turn = keras.ops.cast(self.turn.value + 1, "int32")
            self.turn.assign(turn % len(self.turns))

    # A saved model walks the players' optimizers by itself.

    def _own(self):
        own = [super().iterations]
        return own if self.turn is None else [*own, self.turn]

    def save_own_variables(self, store: Any) -> None:
        for i, variable in enumerate(self._own()):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        own = self._own()
        if len(store.keys()) != len(own):
            raise ValueError(
                "The saved state of the players' optimizers does not fit: "
                "compile with the turns that the saved game had. Received: "
                f"{len(store.keys())} variables, expected {len(own)}"
            )
        for i, variable in enumerate(own):
            variable.assign(store[str(i)])

    def get_config(self) -> dict[str, Any]:
        return {
            "optimizers": keras.saving.serialize_keras_object(self.by_player),
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> "PlayerOptimizers":
        config = dict(config)
        config["optimizers"] = {
            player: keras.saving.deserialize_keras_object(
                optimizer, custom_objects=custom_objects
            )
            for player, optimizer in config["optimizers"].items()
        }
        return cls(**config)


def _check_part(player, optimizer):
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "A LossScaleOptimizer belongs outside, around the optimizers of "
            "all players: LossScaleOptimizer(PlayerOptimizers({...})). Under "
            "mixed_float16 `compile` adds one by itself. Received it for "
            f"player {player!r}"
        )
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "The optimizer of a player must be a single one. Received a "
            f"MultiOptimizer for player {player!r}"
        )
