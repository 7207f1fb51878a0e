"""JointTraining: the stock steps of Keras, with the joint loss of a game."""

import contextlib
import inspect
from typing import Any

import keras

from keras_stab.backend import tracing
from keras_stab.games.joint_loss import JointLoss
from keras_stab.games.joint_step import JointStep
from keras_stab.games.joint_step import evaluate
from keras_stab.games.joint_step import player_on_turn
from keras_stab.games.joint_step import row_count
from keras_stab.games.nan_watch import with_nan_watch
from keras_stab.games.player import Player


class JointTraining(keras.Model):
    """Base of `Game`: how it is trained and what it logs.

    It keeps what only trains: the step that runs now, and a metric for each
    player's loss and for the norm of the joint field. What it trains, the
    players and their variables, is the game's.
    """

    def prepare_training(
        self, players: list[Player], operator_norm: bool
    ) -> None:
        """Makes the metrics, and says that no step runs."""
        self._player_losses = [
            keras.metrics.Mean(name=f"{player.name}_loss") for player in players
        ]
        self._norm = None
        if operator_norm:
            self._norm = keras.metrics.Mean(name="operator_norm")
        self._step: Any = None

    def train_step(self, *state_and_data: Any) -> Any:
        """The stock step, told whose turn it is."""
        turn = player_on_turn(self.optimizer, state_and_data[0])
        with self._in_step(turn):
            result = super().train_step(*state_and_data)
            for joint in self._step.joint_losses:
                joint.check_dependence()
        return result

    def test_step(self, *state_and_data: Any) -> Any:
        """The stock step."""
        with self._in_step():
            return super().test_step(*state_and_data)

    @contextlib.contextmanager
    def _in_step(self, turn=None):
        self._step = JointStep(turn)
        try:
            yield
        finally:
            self._step = None

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The joint loss, a scalar tensor; the stock steps call it."""
        batch = x
        if sample_weight is not None:
            batch = (x, y, sample_weight)
        elif y is not None:
            batch = (x, y)
        self.owned()  # raises when there are weights that nobody owns
        joint = JointLoss(self, batch, training)
        turn = self._step.turn if self._step and training else None
        # A loss may take gradients itself, such as a gradient penalty.
        with tracing.with_gradients():
            total, losses, shares = evaluate(joint, turn, self._norm)
        if not training:
            total = keras.ops.stop_gradient(total)
        if self._step and training:
            self._step.joint_losses.append(joint)
        rows = row_count(batch)
        for metric, loss, share in zip(self._player_losses, losses, shares):
            weight = rows if share is None else rows * share
            metric.update_state(loss, sample_weight=weight)
        return total

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """As `keras.Model.fit`; `TerminateOnNaN` sees the players' losses."""
        given = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs)
        given.arguments["callbacks"] = with_nan_watch(
            given.arguments.get("callbacks"),
            [metric.name for metric in self._player_losses],
        )
        return super().fit(*given.args[1:], **given.kwargs)

    @property
    def metrics_names(self) -> list[str]:
        """The names without the joint sum, as in `evaluate`."""
        return [name for name in super().metrics_names if name != "loss"]

    def get_metrics_result(self) -> dict[str, Any]:
        """The players' losses; the joint sum would only mislead."""
        result = super().get_metrics_result()
        result.pop("loss", None)
        return result
