"""Marks that more than one file of tests uses."""

import keras
import pytest

ON_TORCH = keras.backend.backend() == "torch"


def slow_but_on_torch(test):
    """For what is the same on every backend: the quickest one runs it."""
    return test if ON_TORCH else pytest.mark.slow(test)


def quick(cases, everywhere):
    """`parametrize` values; outside of PyTorch those not named are slow.

    Args:
        cases: List of values, or of tuples of values.
        everywhere: Function from a case to whether it is never slow.
    """
    return [
        case
        if ON_TORCH or everywhere(case)
        else pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.slow,
        )
        for case in cases
    ]
