"""The joint loss of a game: one scalar whose gradient is the joint field."""

import keras

from keras_stab.backend import devices
from keras_stab.backend import differentiation
from keras_stab.gradients.scope import RecordingScope
from keras_stab.numerics.norms import in_full_precision


class JointLoss:
    """Evaluates the players' losses of one batch.

    The joint loss is the sum of `s w L(own, stop_gradient(others))` over the
    players, with s = 1 for a minimiser and -1 for a maximiser: its gradient by
    the variables of a player is that player's own gradient.

    Args:
        game: A `Game`.
        batch: What the losses are called with.
        training: Boolean.
    """

    def __init__(self, game, batch, training):
        self.game, self.batch, self.training = game, batch, training
        self.weights = game.trainable_variables
        # Layers, seeds and metrics may write these in a loss.
        self.carried = [
            *game.non_trainable_variables,
            *game.metrics_variables,
        ]
        self.written = set()
        self.evaluated, self.dependent = set(), set()

    def __call__(self, values, state, who=None):
        """The joint loss of some players, all by default.

        Args:
            values: List of tensors, the weights.
            state: List of tensors, the values of `carried`.
            who: List of players, or `None`.

        Returns:
            The scalar, the players' own losses and the new state.
        """
        players = self.game.players if who is None else who
        if who is None and one_evaluation_suffices(players):
            return self._saddle(values, state)
        total, losses = 0.0, []
        for player in players:
            mapped = [
                self._noticed(player, value)
                if self._owns(player, weight)
                else keras.ops.stop_gradient(value)
                for weight, value in zip(self.weights, values)
            ]
            loss, penalty, state = self._evaluate([player], mapped, state)
            total = total + player.weight * (player.sign * loss + penalty[0])
            losses.append(keras.ops.stop_gradient(loss))
        return total, losses, state

    def _saddle(self, values, state):
        """The joint loss of two players of one zero-sum loss, evaluated once.

        The maximiser's v enters as `2 stop_gradient(v) - v`: the value is v,
        the derivative -1.
        """
        low, high = sorted(self.game.players, key=lambda p: -p.sign)
        mapped = []
        for weight, value in zip(self.weights, values):
            owner = high if self._owns(high, weight) else low
            value = self._noticed(owner, value)
            # The scale of a float8 layer takes its "gradient" for value.
            if owner is high and not weight.overwrite_with_gradient:
                value = 2 * keras.ops.stop_gradient(value) - value
            mapped.append(value)
        players = [low, high]
        loss, penalties, state = self._evaluate(players, mapped, state)
        total = low.weight * (loss + penalties[0] - penalties[1])
        loss = keras.ops.stop_gradient(loss)
        return total, [loss, loss], state

    def _evaluate(self, players, mapped, state):
        """Loss, penalties of the players' weights, and the state after it."""
        mapping = [*zip(self.weights, mapped), *zip(self.carried, state)]
        owned = [
            [w for w in self.weights if self._owns(player, w)]
            for player in players
        ]
        with RecordingScope(mapping) as scope:
            scope.guard(self.weights)
            loss = players[0].evaluate(self.batch, self.training, self.game)
            read = {id(variable) for variable in scope.strays}
            penalties = [
                sum(
                    keras.ops.sum(in_full_precision(w.regularizer(w)))
                    for w in own
                    if getattr(w, "regularizer", None) is not None
                )
                for own in owned
            ]
        self._check_scope(players[0], scope)
        for player, own in zip(players, owned):
            if own and read.isdisjoint(id(w) for w in own):
                self._independent(player)
        names = {player.name for player, own in zip(players, owned) if own}
        self.evaluated |= names
        loss = differentiation.noticing_dependence(
            self._scalar(players[0], loss),
            lambda: self.dependent.update(names),
        )
        if devices.EAGER and self.training:
            self.check_dependence()  # before anything is moved
        after = []
        for variable, value in zip(self.carried, state):
            # A frozen weight stays, whatever spectral normalisation assigns.
            frozen = id(variable) in self.game.weight_ids
            if id(variable) in scope.assigned and not frozen:
                self.written.add(id(variable))
                value = keras.ops.stop_gradient(
                    scope.get_current_value(variable)
                )
            after.append(value)
        return loss, penalties, after

    def _scalar(self, player, loss):
        loss = keras.ops.convert_to_tensor(loss)
        if tuple(loss.shape) != ():
            raise ValueError(
                f"The loss of player {player.name!r} must be a scalar: take "
                f"the mean over the batch. Received: shape {tuple(loss.shape)}"
            )
        if not keras.backend.is_float_dtype(loss.dtype):
            loss = keras.ops.cast(loss, keras.config.floatx())
        return in_full_precision(loss)

    def _check_scope(self, player, scope):
        known = {id(v) for v in [*self.weights, *self.carried]}
        for key, variable in scope.assigned.items():
            if key not in known:
                raise ValueError(
                    f"The loss of player {player.name!r} writes the variable "
                    f"{variable.path!r}, which the game does not track: what "
                    "is written would be lost, and random numbers would repeat "
                    "in every step. Hand the layer, metric or SeedGenerator "
                    "to the game, for example "
                    "Game(..., parts={'noise': seed_generator}), or draw with "
                    "`game.seed_generator`"
                )
        if scope.losses:
            raise ValueError(
                f"A layer in the loss of player {player.name!r} adds a loss "
                "of its own (`add_loss`, `activity_regularizer`), and nothing "
                "says whose it is: take it off the layer and write it into "
                "the loss of a player. Regularizers of weights are added to "
                "the owner's loss"
            )

    def _independent(self, player):
        raise ValueError(
            f"The loss of player {player.name!r} does not depend on the "
            "player's own variables, so the player could never move. Compute "
            "what depends on them inside the loss (fakes made outside of it "
            "are constants), and use no `stop_gradient` and no NumPy on the "
            "way"
        )

    def check_dependence(self):
        """Raises for a player whose loss does not depend on its weights.

        On TensorFlow and JAX only after the loss was differentiated.
        """
        for player in self.game.players:
            if player.name in self.evaluated - self.dependent:
                self._independent(player)

    def _noticed(self, player, value):
        return differentiation.noticing_gradient(
            value, lambda: self.dependent.add(player.name)
        )

    def _owns(self, player, weight):
        return self.game.owner(weight) is player


def one_evaluation_suffices(players):
    """Whether the players are the two sides of the same zero-sum loss."""
    return (
        len(players) == 2
        and players[0].loss == players[1].loss
        and players[0].sense != players[1].sense
        and players[0].weight == players[1].weight
    )
