"""Several players, several losses: `Game`, and games to test methods with."""

from keras_stab.games.differentiating import input_gradient
from keras_stab.games.game import Game
from keras_stab.games.game_problem import GameProblem
from keras_stab.games.player import Player
from keras_stab.games.player_optimizers import PlayerOptimizers
from keras_stab.games.problems import bilinear
from keras_stab.games.problems import forsaken
from keras_stab.games.problems import global_forsaken
from keras_stab.games.problems import polar
from keras_stab.games.problems import quadratic

__all__ = [
    "Game",
    "GameProblem",
    "Player",
    "PlayerOptimizers",
    "bilinear",
    "forsaken",
    "global_forsaken",
    "input_gradient",
    "polar",
    "quadratic",
]


def __dir__():
    return __all__
