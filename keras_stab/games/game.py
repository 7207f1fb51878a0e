"""Game: several players, each with a loss and variables of its own."""

import contextlib
import inspect

import keras

from keras_stab import keras_internals
from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.backend import tracing
from keras_stab.games.compiling import per_player
from keras_stab.games.compiling import prepared
from keras_stab.games.compiling import show_rates
from keras_stab.games.game_arguments import check_serialisable
from keras_stab.games.game_arguments import checked_parts
from keras_stab.games.game_arguments import checked_players
from keras_stab.games.game_arguments import checked_turns
from keras_stab.games.game_arguments import owners
from keras_stab.games.joint_loss import JointLoss
from keras_stab.games.nan_watch import with_nan_watch
from keras_stab.nesting import nest
from keras_stab.optimizers.wrapper import refuse_built_elsewhere


@keras.saving.register_keras_serializable(package="keras_stab")
class Game(keras.Model):
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

    The log shows `<name>_loss` of every player, the mean over all examples;
    with turns over its own turns, 0 before the first of them in an epoch. The
    joint sum is not shown: it says nothing (in a zero-sum game it is 0).
    `evaluate` gives the same figures; `predict` runs one layer, see
    `predict_with`.

    Players are evaluated in their order, each from the state (seeds,
    batch-norm statistics, spectral vectors) that the one before has left. Two
    players with the same loss, one for the minimum and one for the maximum,
    take one evaluation together. What layers assign in a loss to weights,
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
        players,
        parts=None,
        predict_with=None,
        turns="simultaneous",
        operator_norm=False,
        seed=None,
        name=None,
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        self.players = checked_players(players)
        self.pieces = [p for player in self.players for p in player.pieces]
        self.parts = checked_parts(parts)
        if seed is not None:
            seed = checked_count("seed", seed, 0)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.turns = checked_turns(turns, self.players)
        self.operator_norm = checked_boolean("operator_norm", operator_norm)
        if operator_norm and self.turns != "simultaneous":
            raise ValueError(
                "`operator_norm=True` needs the gradients of all players in "
                "every step, and players who take turns do without. Received: "
                f"turns={turns!r}"
            )
        self.predict_with = predict_with
        if predict_with is not None:
            self._layer_of_predictions()
        self._player_losses = [
            keras.metrics.Mean(name=f"{player.name}_loss")
            for player in self.players
        ]
        self._norm = (
            keras.metrics.Mean(name="operator_norm") if operator_norm else None
        )
        self._owners = owners(self.players)
        self._step = None
        self.weight_ids = set()
        self.built = True

    # ---- Who owns what ----------------------------------------------------

    def owner(self, variable):
        """The player to whom a variable belongs, or `None`."""
        return self._owners.get(id(variable))

    def owned(self):
        """Dict: each player's name to its trainable variables.

        Raises:
            ValueError: If a trainable variable of the game belongs to no
                player.
        """
        owned = {player.name: [] for player in self.players}
        for variable in self.trainable_variables:
            owner = self.owner(variable)
            if owner is None:
                raise ValueError(
                    f"The trainable variable {variable.path!r} belongs to no "
                    "player, so that nothing would train it. Give its layer "
                    "to a Player, or freeze it: layer.trainable = False"
                )
            owned[owner.name].append(variable)
        return owned

    @property
    def player_optimizers(self):
        """Dict: each player's name to the optimizer that moves it.

        Set learning rates there:
        `game.player_optimizers["D"].learning_rate = 1e-4`.
        """
        if not self.compiled:
            raise ValueError("There are no optimizers before `compile`")
        parts = per_player(self.optimizer)
        if parts is not None:
            return dict(parts.by_player)
        return {player.name: self.optimizer for player in self.players}

    # ---- Training ---------------------------------------------------------

    def compile(
        self,
        optimizer="sgd",
        run_eagerly=False,
        steps_per_execution=1,
        jit_compile="auto",
        auto_scale_loss=True,
    ):
        """Chooses the optimizer; the losses are the players' own.

        Args:
            optimizer: One joint optimizer, its name, or a dict with one for
                each player's name. With turns, a joint optimizer is copied
                for every player. See `PlayerOptimizers` too.
            run_eagerly, steps_per_execution, jit_compile, auto_scale_loss: As
                in `keras.Model.compile`.

        Raises:
            ValueError: If the optimizer does not suit a game: GRAIN, SAM, IRE,
                a joint `global_clipnorm`, a joint RAPP or CEGPlus or a wrapper
                with turns.
        """
        if devices.replicas() > 1:
            raise ValueError(
                "A Game does not run under a tf.distribute strategy of "
                f"several replicas. Received: {devices.replicas()} replicas"
            )
        turns = None if self.turns == "simultaneous" else self.turns
        optimizer = prepared(optimizer, self.owned(), turns)
        super().compile(
            optimizer=optimizer,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        scaled = keras.optimizers.LossScaleOptimizer
        if self.operator_norm and any(
            isinstance(each, scaled) for each in nest(self.optimizer)
        ):
            raise ValueError(
                "`operator_norm=True` takes gradients that no LossScale"
                "Optimizer has scaled, which underflow in float16. Leave it "
                "out, or use mixed_bfloat16"
            )
        show_rates(self.optimizer)
        self.weight_ids = {
            id(v) for v in keras_internals.weights_to_train(self)
        }
        # On JAX nothing else tells that its state is of other variables.
        refuse_built_elsewhere(self.optimizer, self.trainable_variables)
        # Now, since inside a traced step it would be too late.
        self.optimizer.build(self.trainable_variables)

    def train_step(self, *state_and_data):
        """The stock step, told whose turn it is."""
        with self._in_step(state_and_data[0]):
            result = super().train_step(*state_and_data)
            for joint in self._step.joint_losses:
                joint.check_dependence()
        return result

    def test_step(self, *state_and_data):
        """The stock step."""
        with self._in_step():
            return super().test_step(*state_and_data)

    @contextlib.contextmanager
    def _in_step(self, state=None):
        self._step = _Step(self._turn(state) if state is not None else None)
        try:
            yield
        finally:
            self._step = None

    def _turn(self, state):
        """The value of the turn counter, which the optimizer keeps."""
        parts = per_player(self.optimizer)
        if parts is None or parts.turn is None:
            return None
        if not devices.FUNCTIONAL:
            return parts.player_on_turn(tracing.read(parts.turn))
        # In `fit` it has no value but the one that the step is given.
        for variable, value in zip(self.optimizer.variables, state[2]):
            if variable is parts.turn:
                return parts.player_on_turn(value)
        raise RuntimeError("The optimizer has no turn counter")

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """The joint loss, see above; the stock steps call it."""
        batch = x
        if sample_weight is not None:
            batch = (x, y, sample_weight)
        elif y is not None:
            batch = (x, y)
        self.owned()  # raises when there are weights that nobody owns
        joint = JointLoss(self, batch, training)
        turn = self._step.turn if self._step and training else None
        values = [tracing.read(v) for v in joint.weights]
        state = [v.value for v in joint.carried]
        if turn is not None:
            total, losses, state, shown = self._of_one(
                joint, turn, values, state
            )
        else:
            shown = [None] * len(self.players)
            total, losses, state = self._of_all(joint, values, state)
        if self._step and training:
            self._step.joint_losses.append(joint)
        for variable, value in zip(joint.carried, state):
            if id(variable) in joint.written:
                variable.assign(value)
        rows = _rows(batch)
        for metric, loss, part in zip(self._player_losses, losses, shown):
            weight = rows if part is None else rows * part
            metric.update_state(loss, sample_weight=weight)
        return total

    def _of_all(self, joint, values, state):
        """The joint loss of players who move at the same time."""
        if not self.operator_norm:
            return joint(values, state)
        # With the field at hand, <F, z> is a loss whose gradient is F.
        constants = [keras.ops.stop_gradient(v) for v in values]

        def field(values):
            total, losses, after = joint(values, state)
            return total, (losses, after)

        (_, (losses, after)), gradients = differentiation.value_and_gradients(
            field, constants
        )
        pairs = [
            (keras.ops.stop_gradient(tracing.densify(g)), v)
            for g, v in zip(gradients, values)
            if g is not None
        ]
        square = sum(keras.ops.sum(keras.ops.square(g)) for g, _ in pairs)
        self._norm.update_state(keras.ops.sqrt(square))
        total = sum(keras.ops.sum(g * v) for g, v in pairs)
        return total, losses, after

    def _of_one(self, joint, turn, values, state):
        """The loss of the player on turn; the others' are not computed."""

        def branch(player):
            def evaluate():
                total, (loss,), after = joint(values, state, [player])
                if not any(self.owner(v) is player for v in joint.weights):
                    # PyTorch differentiates nothing that needs no gradient.
                    total = total + sum(0.0 * keras.ops.sum(v) for v in values)
                return [total, loss, *after]

            return evaluate

        total, loss, *after = keras.ops.switch(
            turn, [branch(player) for player in self.players]
        )
        shown = [
            keras.ops.cast(keras.ops.equal(turn, i), "float32")
            for i in range(len(self.players))
        ]
        losses = [
            keras.ops.where(weight > 0, loss, keras.ops.zeros_like(loss))
            for weight in shown
        ]
        return total, losses, after, shown

    def fit(self, *args, **kwargs):
        """As `keras.Model.fit`; `TerminateOnNaN` sees the players' losses."""
        given = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs)
        given.arguments["callbacks"] = with_nan_watch(
            given.arguments.get("callbacks"),
            [metric.name for metric in self._player_losses],
        )
        return super().fit(*given.args[1:], **given.kwargs)

    @property
    def metrics_names(self):
        """Without the joint sum, as `evaluate`."""
        return [name for name in super().metrics_names if name != "loss"]

    def get_metrics_result(self):
        """The players' losses; the joint sum would only mislead."""
        result = super().get_metrics_result()
        result.pop("loss", None)
        return result

    # ---- Predictions ------------------------------------------------------

    def call(self, x, training=False):
        """Runs the layer `predict_with`."""
        if self._step is not None:
            return x  # the losses call what they need themselves
        if self.predict_with is None:
            raise ValueError(
                "A game has several models: say which one `predict` and "
                "`game(x)` run, Game(..., predict_with='<layer>')"
            )
        return self._layer_of_predictions()(x, training=training)

    def _layer_of_predictions(self):
        named = {
            piece.name: piece
            for piece in [*self.pieces, *self.parts.values()]
            if isinstance(piece, keras.layers.Layer)
        }
        named.update(
            (name, part)
            for name, part in self.parts.items()
            if isinstance(part, keras.layers.Layer)
        )
        known = isinstance(self.predict_with, str)
        if not known or self.predict_with not in named:
            raise ValueError(
                "`predict_with` must be the name of a layer of a player or of "
                f"`parts`. Received: predict_with={self.predict_with!r}, known "
                f"layers: {sorted(named)}"
            )
        return named[self.predict_with]

    # ---- Saving -----------------------------------------------------------

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # Keras saves no seeds; without this a resumed run draws other noise.
        store["seed"] = self.seed_generator.state.numpy()

    def load_own_variables(self, store):
        store = {key: store[key] for key in store.keys()}
        self.seed_generator.state.assign(store.pop("seed"))
        super().load_own_variables(store)

    def get_config(self):
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
    def from_config(cls, config, custom_objects=None):
        return cls(
            **{
                key: keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
                for key, value in config.items()
            }
        )

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(config)
        known = inspect.signature(Game.compile).parameters
        self.compile(**{k: v for k, v in config.items() if k in known})


class _Step:
    """What is known only while a train or test step runs."""

    def __init__(self, turn):
        self.turn = turn
        self.joint_losses = []


def _rows(batch):
    """How many examples a batch has, by which Keras weights what it logs."""
    shapes = [
        keras.ops.shape(leaf)
        for leaf in keras.tree.flatten(batch)
        if leaf is not None
    ]
    rows = shapes[0][0] if shapes and len(shapes[0]) else 1
    return keras.ops.cast(rows, "float32")
