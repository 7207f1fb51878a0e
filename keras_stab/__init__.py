"""Stable training for Keras 3, on TensorFlow, JAX and PyTorch.

Every method is an ordinary Keras optimizer, or wraps one:

    model.compile(optimizer=keras_stab.GRAIN("adamw"), ...)
    model.fit(...)

By symptom:

    wrong labels are memorised             GRAIN
    training is perfect, the test is not   SAM
    accuracy jumps between epochs          WeightAveraging, AveragedSGD
    the length of the run is unknown       ScheduleFree
    large batches diverge                  LARS, TVLARS; LAMB (transformers)
    pretraining takes too many steps       IRE
    the loss spikes, gradients explode     AdaptiveClipping
    a GAN cycles or collapses              Game with Lookahead, ExtraGradient,
                                           OptimisticGradient, CEGPlus or RAPP
    results change with the seed           WeightAveraging; LARS for large
                                           batches; stability_report measures

Evaluation weights (averages, slow weights) are in the model when `fit`
evaluates and when it ends. For more: `averaged_weights`, `export_averaged`,
`return_trained_weights`, the callbacks `AveragedWeights` and
`SwapSlowWeights`, `reestimate_batch_norm`. What a method does: `StabilityMonitor`, `sharpness`,
`loss_landscape`, `group_gradients`, `compare_scores`, `seeds_needed`.

Namespaces: `keras_stab.optimizers`, `.callbacks`, `.schedules`, `.games`,
`.constraints` and `.diagnostics` hold the same names, sorted.

`python -m keras_stab` lists the methods and tests them here. In the
repository, `guides/how_to_choose.md` leads from symptoms to methods, and
`guides/cards` has settings, costs and negative results of each.
"""

from keras_stab.backend import finding

# isort: split
from keras_stab import callbacks
from keras_stab import constraints
from keras_stab import diagnostics
from keras_stab import games
from keras_stab import methods
from keras_stab import optimizers
from keras_stab import schedules
from keras_stab._version import __version__
from keras_stab.batch_norm import reestimate_batch_norm
from keras_stab.callbacks import AveragedWeights
from keras_stab.callbacks import RecoverFromSpikes
from keras_stab.callbacks import StabilityMonitor
from keras_stab.callbacks import StartBoostAtLoss
from keras_stab.callbacks import SwapSlowWeights
from keras_stab.diagnostics import compare_scores
from keras_stab.diagnostics import group_gradients
from keras_stab.diagnostics import loss_landscape
from keras_stab.diagnostics import plot_loss_landscape
from keras_stab.diagnostics import seeds_needed
from keras_stab.diagnostics import sharpness
from keras_stab.diagnostics import stability_report
from keras_stab.evaluation import averaged_weights
from keras_stab.evaluation import export_averaged
from keras_stab.evaluation import return_trained_weights
from keras_stab.games import Game
from keras_stab.games import Player
from keras_stab.gradients.one_pass.layer_rules import register_layer_rule
from keras_stab.gradients.small_problems import min_norm_weights
from keras_stab.optimizers import GRAIN
from keras_stab.optimizers import IRE
from keras_stab.optimizers import LAMB
from keras_stab.optimizers import LARS
from keras_stab.optimizers import RAPP
from keras_stab.optimizers import SAM
from keras_stab.optimizers import TVLARS
from keras_stab.optimizers import AdaptiveClipping
from keras_stab.optimizers import Aggregate
from keras_stab.optimizers import AveragedSGD
from keras_stab.optimizers import CEGPlus
from keras_stab.optimizers import ExtraGradient
from keras_stab.optimizers import Lookahead
from keras_stab.optimizers import OptimisticGradient
from keras_stab.optimizers import PastExtraGradient
from keras_stab.optimizers import ScheduleFree
from keras_stab.optimizers import WeightAveraging
from keras_stab.schedules import ConstantTail
from keras_stab.schedules import TimeVaryingSigmoid
from keras_stab.schedules import WarmupCosine
from keras_stab.schedules import WarmupPolynomial
from keras_stab.trainer.installation import TrainStep
from keras_stab.trainer.installation import install
from keras_stab.trainer.installation import uninstall

__all__ = [
    "AdaptiveClipping",
    "Aggregate",
    "AveragedSGD",
    "AveragedWeights",
    "CEGPlus",
    "ConstantTail",
    "ExtraGradient",
    "GRAIN",
    "Game",
    "IRE",
    "LAMB",
    "LARS",
    "Lookahead",
    "OptimisticGradient",
    "PastExtraGradient",
    "Player",
    "RAPP",
    "RecoverFromSpikes",
    "SAM",
    "ScheduleFree",
    "StabilityMonitor",
    "StartBoostAtLoss",
    "SwapSlowWeights",
    "TVLARS",
    "TimeVaryingSigmoid",
    "TrainStep",
    "WarmupCosine",
    "WarmupPolynomial",
    "WeightAveraging",
    "averaged_weights",
    "callbacks",
    "compare_scores",
    "constraints",
    "diagnostics",
    "export_averaged",
    "games",
    "group_gradients",
    "install",
    "loss_landscape",
    "methods",
    "min_norm_weights",
    "optimizers",
    "plot_loss_landscape",
    "reestimate_batch_norm",
    "register_layer_rule",
    "return_trained_weights",
    "schedules",
    "seeds_needed",
    "sharpness",
    "stability_report",
    "uninstall",
]


def __dir__():
    return [*__all__, "__version__"]


install()
