"""Small games with known solutions, to test and to teach methods with."""

import math

import keras
import numpy as np

from keras_stab.arguments import checked_number
from keras_stab.constraints import Box
from keras_stab.constraints import L2Ball
from keras_stab.games.game import Game
from keras_stab.games.game_problem import GameProblem
from keras_stab.games.game_problem import Point
from keras_stab.games.game_problem import clip
from keras_stab.games.game_problem import on_arrays
from keras_stab.games.game_problem import saddle
from keras_stab.games.player import Player


def bilinear(offset: float = 0.0, radius: float | None = None) -> GameProblem:
    r"""`min max (x - offset) (y - offset)`.

    Args:
        offset: Float. Defaults to `0.0`.
        radius: Float, of the box $[-r, r]^2$, or `None` for the plane.

    Returns:
        A `GameProblem`.

    Example:

    >>> import keras
    >>> from keras_stab import games
    >>> problem = games.bilinear()
    >>> problem.game.compile(keras.optimizers.SGD(0.1))
    >>> history = problem.game.fit(problem.steps(2), batch_size=1, verbose=0)
    >>> problem.point.round(3)
    array([0.89 , 0.695])
    """
    offset = checked_number("offset", offset)
    start = (0.0, 0.0) if offset else (1.0, 0.5)
    return saddle(
        lambda x, y: (x - offset) * (y - offset),
        lambda x, y: (y - offset, offset - x),
        radius,
        solution=(offset, offset),
        L=1.0,
        rho=0.0,
        start=start,
    )


def quadratic(
    L: float = 3.0, rho: float = -1.0 / 9.0, radius: float | None = None
) -> GameProblem:
    r"""`min max a x y + b x^2 / 2 - b y^2 / 2` with given L and rho.

    $a = \sqrt{L^2 - L^4 \rho^2}$ and $b = L^2 \rho$: for negative rho both
    players want to leave the solution.

    Args:
        L: Float above 0. Defaults to `3.0`.
        rho: Float of at most `1 / L` in size. Defaults to `-1/9`.
        radius: As in `bilinear`.

    Returns:
        A `GameProblem`.
    """
    L = checked_number("L", L, above=0.0)
    rho = checked_number("rho", rho)
    if abs(rho * L) > 1.0:
        raise ValueError(
            f"`rho` must be at most 1 / L in size. Received: rho={rho}, L={L}"
        )
    a, b = math.sqrt(max(L**2 - L**4 * rho**2, 0.0)), L**2 * rho
    return saddle(
        lambda x, y: a * x * y + 0.5 * b * x * x - 0.5 * b * y * y,
        lambda x, y: (b * x + a * y, b * y - a * x),
        radius,
        solution=(0.0, 0.0),
        L=L,
        rho=rho,
        start=(1.0, 0.5),
    )


def polar(a: float = 1.0 / 3.0) -> GameProblem:
    r"""A field with an attracting cycle of radius 1 around its solution.

    $F = (x q - y, y q + x)$, $q = a (r^2 - 1)(16 r^2 - 9) / 16$, on the box
    of radius 1.1: the circle of radius 3/4 repels. F is the gradient of no
    pair of losses, so the losses are `z_i stop_gradient(F_i)`.

    Args:
        a: Float above 0. Defaults to `1/3`.

    Returns:
        A `GameProblem`.
    """
    a = checked_number("a", a, above=0.0)

    def field(x, y):
        square = x * x + y * y
        q = a * (square - 1.0) * (16.0 * square - 9.0) / 16.0
        return x * q - y, y * q + x

    def loss(i):
        def player_loss(batch, training, game):
            z = [v.value for v in game.trainable_variables]
            return z[i] * keras.ops.stop_gradient(field(*z)[i])

        return player_loss

    box = Box(-1.1, 1.1)
    x, y = Point(1.0, box, "x"), Point(0.5, box, "y")
    game = Game([Player("x", x, loss(0)), Player("y", y, loss(1))])
    # The Jacobian is largest in the corners of the box, q is smallest at
    # r^2 = 25/32, and q / (q^2 + 1) falls with q down to -1.
    q = max(-a * 49.0 / 1024.0, -1.0)
    return GameProblem(
        game,
        on_arrays(field),
        clip(1.1),
        np.zeros(2),
        L=_corner_norm(a),
        rho=q / (q * q + 1.0),
        start=np.array([1.0, 0.5]),
    )


def _corner_norm(a):
    square = 2.0 * 1.1**2
    q = a * (square - 1.0) * (16.0 * square - 9.0) / 16.0
    slope = 2.0 * 1.1**2 * a * (32.0 * square - 25.0) / 16.0
    return float(
        np.linalg.norm([[q + slope, slope - 1.0], [slope + 1.0, q + slope]], 2)
    )


def forsaken(radius: float | None = 1.5) -> GameProblem:
    r"""`min max x (y - 0.45) + psi(x) - psi(y)`, with two cycles.

    $\psi(t) = t^2 / 4 - t^4 / 2 + t^6 / 6$. The solution and the
    inner cycle repel gradient descent ascent; the outer cycle attracts it.

    Args:
        radius: Float, of the box, or `None` for the plane (then L is
            infinite). rho is known for 1.5 only, otherwise NaN. Defaults to
            `1.5`.

    Returns:
        A `GameProblem`.
    """
    radius = checked_number("radius", radius, 0.0, optional=True)

    def psi(t):
        return t * t / 4.0 - t**4 / 2.0 + t**6 / 6.0

    def slope(t):
        return t / 2.0 - 2.0 * t**3 + t**5

    return saddle(
        lambda x, y: x * (y - 0.45) + psi(x) - psi(y),
        lambda x, y: (y - 0.45 + slope(x), slope(y) - x),
        radius,
        solution=(0.07802666873846001, 0.4119338513658209),
        L=math.inf if radius is None else _forsaken_norm(radius),
        rho=-1.520566154622643 if radius == 1.5 else math.nan,
        start=(1.0, 1.0),
    )


def _forsaken_norm(radius):
    """The Jacobian's norm is convex in the two curvatures: look at the ends."""
    squares = np.array([0.0, min(0.6, radius**2), radius**2])
    curvatures = 0.5 - 6.0 * squares + 5.0 * squares**2
    ends = curvatures.min(), curvatures.max()
    norms = [
        np.linalg.norm([[p, 1.0], [-1.0, q]], 2) for p in ends for q in ends
    ]
    return float(max(norms))


def global_forsaken() -> GameProblem:
    r"""`min max x y + psi(x) - psi(y)` on the ball of radius 4/3.

    $\psi(t) = 2 t^6 / 21 - t^4 / 3 + t^2 / 3$. The ball holds both players
    together, so the game is posed with one player and one vector.

    Returns:
        A `GameProblem`.
    """

    def field(x, y):
        return y + _global_slope(x), _global_slope(y) - x

    def loss(batch, training, game):
        z = game.trainable_variables[0].value
        along = keras.ops.stack(field(z[0], z[1]))
        return keras.ops.sum(z * keras.ops.stop_gradient(along))

    def project(z):
        z = np.asarray(z, "float64")
        return z * min(1.0, 4.0 / 3.0 / max(np.linalg.norm(z), 1e-300))

    start = project([1.2, 1.2])
    ball = Point(start, L2Ball(4.0 / 3.0), "xy")
    return GameProblem(
        Game([Player("xy", ball, loss)]),
        on_arrays(field),
        project,
        np.zeros(2),
        L=3.022397641960374,
        rho=-0.11973199294086692,
        start=start,
    )


def _global_slope(t):
    return 4.0 * t**5 / 7.0 - 4.0 * t**3 / 3.0 + 2.0 * t / 3.0
