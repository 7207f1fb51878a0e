"""Noisy games of two numbers whose solution is known."""

import keras
import numpy as np

import keras_stab
from stability import arms
from stability.task import Task

NEAREST = 1e-8


class TwoPlayerGame(Task):
    """A game that sees its gradients with noise, from a start by the seed.

    Args:
        name: String.
        title: String.
        problem: Function that makes a `keras_stab.games.GameProblem`.
        rates: Learning rates to search, in units of 1 / L.
        noise: Float, standard deviation of the noise in a partial derivative.
        steps: Int, gradients of a run; divided by 6, for the methods that
            take two or three for a step.
    """

    metric = "log10 of the distance"
    unit = "decades"
    higher_is_better = False
    arms = arms.GAMES

    def __init__(self, name, title, problem, rates, noise=0.1, steps=600):
        super().__init__()
        if steps % 6:
            raise ValueError(f"6 must divide `steps`. Received: steps={steps}")
        self.name, self.title, self.problem = name, title, problem
        self.rates, self.noise, self.steps = rates, noise, steps
        self.known = problem()

    def settings(self):
        return {**super().settings(), "noise": self.noise}

    def prepare(self, data, cache):
        """There is no data."""

    def make_model(self):
        problem = self.problem()
        game = keras_stab.Game(
            [
                keras_stab.Player(
                    player.name,
                    player.pieces,
                    self._with_noise(player.loss),
                    player.sense,
                )
                for player in problem.game.players
            ]
        )
        start = keras.random.uniform((2,), -1.0, 1.0)
        problem.point = problem.project(keras.ops.convert_to_numpy(start))
        return game

    def _with_noise(self, loss):
        # One function for both players of a zero-sum game.
        if not hasattr(loss, "with_noise"):

            def with_noise(batch, training, game):
                weights = [v.value for v in game.trainable_variables]
                z = keras.ops.concatenate(
                    [keras.ops.reshape(value, (-1,)) for value in weights]
                )
                noise = keras.ops.sum(self.noise * batch[0] * z)
                return loss(batch, training, game) + noise

            loss.with_noise = with_noise
        return loss.with_noise

    def make_base(self, rate):
        return keras.optimizers.SGD(arms.scaled(rate, 1.0 / self.known.L))

    def plain_steps(self, make, rate):
        return make(arms.scaled(rate, 1.0 / self.known.L))

    def compile(self, model, optimizer):
        model.compile(optimizer)

    def train(self, model, seeds, arm, callbacks=None):
        noise = np.random.default_rng([seeds.order, 2]).normal(
            size=(self.steps, 2)
        )
        model.fit(
            noise.astype("float32"),
            batch_size=1,
            shuffle=False,
            callbacks=callbacks,
            verbose=0,
        )

    def score(self, model, part):
        point = np.concatenate(
            [
                keras.ops.convert_to_numpy(v).reshape(-1)
                for v in model.trainable_variables
            ]
        )
        distance = np.linalg.norm(point.astype("float64") - self.known.solution)
        return {self.metric: np.log10(max(distance, NEAREST))}
