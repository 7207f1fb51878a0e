"""Callbacks: evaluation weights, the start of a boost, and reports."""

from keras_stab.callbacks.recover_from_spikes import RecoverFromSpikes
from keras_stab.callbacks.stability_monitor import StabilityMonitor
from keras_stab.callbacks.start_boost import StartBoostAtLoss
from keras_stab.callbacks.swap_weights import AveragedWeights
from keras_stab.callbacks.swap_weights import SwapSlowWeights

__all__ = [
    "AveragedWeights",
    "RecoverFromSpikes",
    "StabilityMonitor",
    "StartBoostAtLoss",
    "SwapSlowWeights",
]


def __dir__():
    return __all__
