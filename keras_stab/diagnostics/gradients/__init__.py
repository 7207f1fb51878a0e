"""Gradients of groups of rows and of single rows, outside of training."""

from keras_stab.diagnostics.gradients.grouped import GradientGroups
from keras_stab.diagnostics.gradients.grouped import group_gradients

__all__ = ["GradientGroups", "group_gradients"]


def __dir__():
    return __all__
