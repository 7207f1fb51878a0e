"""Checks of the arguments of a comparison of scores."""

import numpy as np

from keras_stab.arguments import checked_choices
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number

QUESTIONS = ("mean", "spread")


def checked_options(level, questions, relevant_difference):
    """The same, if they are in range."""
    return (
        checked_fraction("level", level, one=False),
        checked_choices("questions", questions, QUESTIONS),
        checked_number(
            "relevant_difference",
            relevant_difference,
            above=0.0,
            optional=True,
        ),
    )


def as_scores(argument: str, scores: object) -> np.ndarray:
    try:
        return np.asarray(scores, dtype="float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must be a list of numbers. Received: "
            f"{argument}={scores!r}"
        ) from error


def check_twos(names, failed, runs):
    if isinstance(names, str) or len(names) != 2:
        raise ValueError(
            "`names` must hold the two names of the arms. Received: "
            f"names={names!r}"
        )
    if failed is not None and [np.shape(own) for own in failed] != 2 * [
        (runs,)
    ]:
        raise ValueError(
            f"`failed` must hold two lists of {runs} booleans, one per run. "
            f"Received: failed={failed!r}"
        )


def check_pairs(a, b):
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            "Two lists of scores of the same length are needed, paired seed "
            f"by seed. Received: shapes {a.shape} and {b.shape}"
        )
    if len(a) < 2:
        raise ValueError(
            "A comparison needs at least two seeds; five or more are advised. "
            f"Received: {len(a)}"
        )
