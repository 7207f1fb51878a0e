"""Marks that more than one file of tests uses."""

import keras
import pytest


def slow_but_on_torch(test):
    """For what is the same on every backend: the quickest one runs it."""
    if keras.backend.backend() == "torch":
        return test
    return pytest.mark.slow(test)
