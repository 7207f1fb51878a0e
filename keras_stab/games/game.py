"""Game: several players, each with a loss and variables of its own."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.games.compiling import check_norm_of_scaled
from keras_stab.games.compiling import per_player
from keras_stab.games.compiling import prepared
from keras_stab.games.compiling import refuse_arguments
from keras_stab.games.compiling import refuse_replicas
from keras_stab.games.compiling import show_rates
from keras_stab.games.game_arguments import check_serialisable
from keras_stab.games.game_arguments import checked_parts
from keras_stab.games.game_arguments import checked_players
from keras_stab.games.game_arguments import checked_turns
from keras_stab.games.game_arguments import named_layer
from keras_stab.games.game_arguments import owners
from keras_stab.games.joint_training import JointTraining
from keras_stab.games.player import Player
from keras_stab.optimizers.wrapper import refuse_built_elsewhere
from keras_stab.registration import registered


@registered
class Game(JointTraining):
    r"""A model of several players, trained by the stock train step.

    Player i minimises (or maximises) its own loss $L_i$ over its own
    variables $z_i$. `compute_loss` returns

    $$
    \sum_i s_i w_i L_i(z_i, \mathrm{stop\_gradient}(z_{-i})), \qquad
    s_i = 1 \text{ (min) or } -1 \text{ (max)},
    $$

    whose gradient is the joint field $F = (s_i w_i \nabla_{z_i} L_i)_i$. So
    one backward pass serves all players, `fit` works as for any model, and
    the optimizer decides what to do with F.

    The log shows `<name>_loss` of every player, the mean over all examples.
    With turns it is the mean over the player's own turns, and 0 before the
    first of them in an epoch. The joint sum is not shown, since it says
    nothing (in a zero-sum game it is 0).
    `evaluate` gives the same figures; `predict` runs one layer, see
    `predict_with`.

    Players are evaluated in their order, each from the state (seeds,
    batch-norm statistics, spectral vectors) that the one before has left. Two
    players with the same loss, one minimising and one maximising it, share one
    evaluation. What layers assign in a loss to weights,
    frozen ones too, is dropped, so that `SpectralNormalization` gives on every
    backend what it gives on JAX.

    Args:
        players: List of `Player`.
        parts: `None`, or a dict of further things that the losses use: layers,
            variables, metrics, `keras.random.SeedGenerator`s. What writes
            state (dropout, noise, batch norm) must belong to a player or be
            here. Reach them by `game.parts[name]`.
        predict_with: `None`, or the name of the layer that `predict` and
            `game(x)` run, of a player or of `parts`. `batch_norm_data` of
            callbacks, and data for `reestimate_batch_norm`, are inputs of
            this layer: noise for a generator.
        turns: `"simultaneous"`, or a tuple of players' names such as
            `("D", "D", "G")`: then every train step moves one player only.
            The losses of the others are not computed, and their weights, slots
            and step counts stay as they are. Defaults to `"simultaneous"`.
        operator_norm: Whether $\|F\|$ of every batch is logged, as
            `operator_norm`, and given by `evaluate`; not with turns.
            Defaults to `False`.
        seed: Int or `None`, of `game.seed_generator`, which losses may use
            and which is saved with the game.
        name: String or `None`.
        **kwargs: Of `keras.Model`.

    Raises:
        ValueError: If a trainable variable belongs to no player or to two, or
            a name is unknown or used twice.

    A game is saved when its parts can be: layers as they are, losses as
    functions registered by `keras.saving.register_keras_serializable` that
    take `game` and find layers by `game.get_layer(name)`. Or write a subclass
    of `Game` with a `get_config`.

    Example, `min max x y`:

    >>> import keras, keras_stab
    >>> import numpy as np
    >>> x, y = keras.Variable(1.0, name="x"), keras.Variable(1.0, name="y")
    >>> product = lambda batch, training: x * y
    >>> game = keras_stab.Game(
    ...     [
    ...         keras_stab.Player("low", x, product),
    ...         keras_stab.Player("high", y, product, sense="max"),
    ...     ]
    ... )
    >>> game.compile(keras.optimizers.SGD(0.5))
    >>> logs = game.fit(np.zeros((1, 1)), batch_size=1, verbose=0)
    >>> float(x.numpy()), float(y.numpy())
    (0.5, 1.5)

    Departures from the paper:
        None: this is the setting in which the methods are stated. Turns,
        several steps of one player, and Adam are outside of their theory.

    References:
        Pethick, Xie and Cevher (2023), arXiv:2310.13459.
    """

    def __init__(
        self,
        players: Sequence[Player],
        parts: dict[str, Any] | None = None,
        predict_with: str | None = None,
        turns: str | Sequence[str] = "simultaneous",
        operator_norm: bool = False,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.players = checked_players(players)
        self.pieces = [p for player in self.players for p in player.pieces]
        self.parts = checked_parts(parts)
        self.seed = checked_count("seed", seed, 0, optional=True)
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.turns = checked_turns(turns, self.players)
        self.operator_norm = checked_boolean("operator_norm", operator_norm)
        if self.operator_norm and self.turns != "simultaneous":
            raise ValueError(
                "`operator_norm=True` needs the gradients of all players in "
                "every step; with turns only one player's are computed. "
                f"Received: turns={turns!r}"
            )
        self.predict_with = predict_with
        if predict_with is not None:
            named_layer(predict_with, self.pieces, self.parts)
        self._owners = owners(self.players)
        self.prepare_training(self.players, self.operator_norm)
        self.weight_ids: set[int] = set()
        self.built = True

    # ---- Who owns what ----------------------------------------------------

    def owner(self, variable: keras.Variable) -> Player | None:
        """The player to whom a variable belongs, or `None`."""
        return self._owners.get(id(variable))

    def owned(self) -> dict[str, list[keras.Variable]]:
        """Dict: each player's name to its trainable variables.

        Raises:
            ValueError: If a trainable variable belongs to no player.
        """
        owned: dict = {player.name: [] for player in self.players}
        for variable in self.trainable_variables:
            owner = self.owner(variable)
            if owner is None:
                raise ValueError(
                    f"The trainable variable {variable.path!r} belongs to no "
                    "player, so that nothing would train it. Give its layer "
                    "to a Player, or freeze it: layer.trainable = False. "
                    f"Received: players {list(owned)}"
                )
            owned[owner.name].append(variable)
        return owned

    @property
    def player_optimizers(self) -> dict[str, keras.optimizers.Optimizer]:
        """Dict: each player's name to the optimizer that moves it.

        Set learning rates there:
        `game.player_optimizers["D"].learning_rate = 1e-4`.
        """
        if not self.compiled:
            raise ValueError("Call `compile` first: there are no optimizers")
        parts = per_player(self.optimizer)
        if parts is not None:
            return dict(parts.by_player)
        return {player.name: self.optimizer for player in self.players}

    # ---- Compilation -------------------------------------------------------

    def compile(
        self,
        optimizer: str | dict | keras.optimizers.Optimizer = "sgd",
        loss: None = None,
        *,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
        **kwargs: Any,
    ) -> None:
        """Chooses the optimizer; the losses are the players' own.

        Args:
            optimizer: One joint optimizer, its name, or a dict with one for
                each player's name (see `PlayerOptimizers`). With turns, a
                joint optimizer is copied for every player.
            run_eagerly and the others: As in `keras.Model.compile`.
            loss, **kwargs: Refused, since each player has its own loss.

        Raises:
            ValueError: If the optimizer does not suit a game: GRAIN, SAM, IRE,
                a joint `global_clipnorm`, a joint RAPP or CEGPlus or a wrapper
                with turns. Also for `loss`, `metrics` and the like.
        """
        refuse_arguments({"loss": loss, **kwargs}, self.players)
        refuse_replicas()
        turns = None if self.turns == "simultaneous" else self.turns
        optimizer = prepared(optimizer, self.owned(), turns)
        super().compile(
            optimizer=optimizer,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        if self.operator_norm:
            check_norm_of_scaled(self.optimizer)
        show_rates(self.optimizer)
        self.weight_ids = {
            id(v) for v in keras_internals.weights_to_train(self)
        }
        # On JAX nothing else would notice state of other variables.
        refuse_built_elsewhere(self.optimizer, self.trainable_variables)
        # Inside a traced step it would be too late.
        self.optimizer.build(self.trainable_variables)

    # ---- Predictions ------------------------------------------------------

    def call(self, x: Any, training: bool = False) -> Any:
        """Runs the layer `predict_with`."""
        if self._step is not None:
            return x  # the losses call what they need themselves
        if self.predict_with is None:
            raise ValueError(
                "A game has several models: say which one `predict` and "
                "`game(x)` run, Game(..., predict_with='<layer>'). Received: "
                "predict_with=None"
            )
        layer = named_layer(self.predict_with, self.pieces, self.parts)
        return layer(x, training=training)

    # ---- Saving -----------------------------------------------------------

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        # Keras saves no seeds; without this a resumed run draws other noise.
        store["seed"] = self.seed_generator.state.numpy()

    def load_own_variables(self, store: Any) -> None:
        store = {key: store[key] for key in store.keys()}
        self.seed_generator.state.assign(store.pop("seed"))
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        for player in self.players:
            check_serialisable(self, player)
        config = {
            "players": list(self.players),
            "parts": dict(self.parts),
            "predict_with": self.predict_with,
            "turns": self.turns,
            "operator_norm": self.operator_norm,
            "seed": self.seed,
            "name": self.name,
            "dtype": self.dtype_policy,
            "trainable": self.trainable,
        }
        return {
            key: keras.saving.serialize_keras_object(value)
            for key, value in config.items()
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> "Game":
        return cls(
            **{
                key: keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
                for key, value in config.items()
            }
        )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        config = keras.saving.deserialize_keras_object(config)
        known = inspect.signature(Game.compile).parameters
        self.compile(**{k: v for k, v in config.items() if k in known})
