"""Several players, several losses: `Game`, and games to test methods with."""

from keras_stab.games.game import Game
from keras_stab.games.player import Player
from keras_stab.games.player_optimizers import PlayerOptimizers
