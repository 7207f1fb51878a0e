"""All tasks by name."""

import functools

from keras_stab import games
from stability.cifar_large_batch import CifarLargeBatch
from stability.digits import LONG
from stability.digits import Digits
from stability.fashion_mnist import FashionMnist
from stability.generation import Generation
from stability.small_gan import SmallGan
from stability.text_classification import TextClassification
from stability.text_regression import TextRegression
from stability.two_player_game import TwoPlayerGame

WRONG = 0.25
TEXTS = {
    f"{data}_{rows}{'_wrong' if wrong else ''}": functools.partial(
        TextClassification, data, rows, wrong
    )
    for data in ("sst2", "mrpc", "rte")
    for rows in (64, 256)
    for wrong in (0.0, WRONG)
}
TASKS = {
    **TEXTS,
    "stsb_256": TextRegression,
    "generation": Generation,
    "fashion_mnist": FashionMnist,
    "cifar_large_batch": CifarLargeBatch,
    "digits_wrong": Digits,
    "digits_wrong_long": functools.partial(Digits, epochs=LONG),
    "small_gan": SmallGan,
    "game_monotone": functools.partial(
        TwoPlayerGame,
        "game_monotone",
        "Noisy game, rotation and weak attraction",
        functools.partial(games.quadratic, L=1.0, rho=0.1),
        (0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "game_forsaken": functools.partial(
        TwoPlayerGame,
        "game_forsaken",
        "Noisy game, a cycle around the solution",
        games.global_forsaken,
        (0.01, 0.03, 0.1, 0.3, 1.0),
    ),
}
