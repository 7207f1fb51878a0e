"""GameProblem: a small game with what is known about it."""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence

import keras
import numpy as np

from keras_stab.arguments import checked_number
from keras_stab.constraints import Box
from keras_stab.games.game import Game
from keras_stab.games.player import Player


class Point(keras.layers.Layer):
    """A layer that is a point: one weight, `z`."""

    def __init__(self, start, constraint, name):
        super().__init__(dtype=keras.config.floatx(), name=name)
        self.z = self.add_weight(
            shape=np.shape(start), name="z", constraint=constraint
        )
        self.z.assign(start)
        self.built = True


@dataclasses.dataclass
class GameProblem:
    r"""A game with what is known about it.

    Attributes:
        game: A `Game` that holds `start`, not compiled. What it is fed with
            does not matter: the losses do not look at it.
        operator: The field `F(z)`, from an array of shape `(2,)` to another.
        project: The projection to the domain, likewise.
        solution: Array of shape `(2,)`.
        L: Float, the Lipschitz constant of F on the domain.
        rho: Float, the largest number for which
            $\langle F(z), z - z^* \rangle \ge \rho \|F(z)\|^2$ on the domain.
        start: Array of shape `(2,)`, in the domain.
    """

    game: Game
    operator: Callable[[np.ndarray], np.ndarray]
    project: Callable[[np.ndarray], np.ndarray]
    solution: np.ndarray
    L: float
    rho: float
    start: np.ndarray

    @property
    def point(self) -> np.ndarray:
        """Where the players stand, as an array of shape `(2,)`."""
        values = [v.numpy().reshape(-1) for v in self.game.trainable_variables]
        return np.concatenate(values).astype("float64")

    @point.setter
    def point(self, z: Sequence[float] | np.ndarray) -> None:
        z = np.asarray(z)
        variables = self.game.trainable_variables
        parts = [z] if len(variables) == 1 else list(z)
        for variable, part in zip(variables, parts):
            variable.assign(part)

    def steps(self, count: int) -> np.ndarray:
        """Data for `count` train steps of batch size 1."""
        return np.zeros((count, 1), "float32")


def saddle(phi, field, radius, solution, L, rho, start):
    """A game of two numbers, of which one minimises and one maximises phi."""
    radius = checked_number("radius", radius, 0.0, optional=True)
    constraint = None if radius is None else Box(-radius, radius)

    def loss(batch, training, game):
        return phi(*(v.value for v in game.trainable_variables))

    project = clip(radius)
    start = project(start)
    x = Point(start[0], constraint, "x")
    y = Point(start[1], constraint, "y")
    players = [Player("x", x, loss), Player("y", y, loss, sense="max")]
    return GameProblem(
        Game(players),
        on_arrays(field),
        project,
        np.array(solution),
        L=L,
        rho=rho,
        start=start,
    )


def clip(radius):
    """The projection to the box of that radius, of arrays."""
    limit = math.inf if radius is None else radius
    return lambda z: np.clip(np.asarray(z, "float64"), -limit, limit)


def on_arrays(field):
    """A field of two numbers as a function of an array."""
    return lambda z: np.array(field(*np.asarray(z, "float64")))
