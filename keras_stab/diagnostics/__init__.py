"""Whether a method helps: reports over seeds, and the loss around minima."""

from keras_stab.diagnostics.gradients import GradientGroups
from keras_stab.diagnostics.gradients import group_gradients
from keras_stab.diagnostics.loss import Landscape
from keras_stab.diagnostics.loss import Sharpness
from keras_stab.diagnostics.loss import loss_landscape
from keras_stab.diagnostics.loss import plot_loss_landscape
from keras_stab.diagnostics.loss import sharpness
from keras_stab.diagnostics.report import ArmSummary
from keras_stab.diagnostics.report import Comparison
from keras_stab.diagnostics.report import Interval
from keras_stab.diagnostics.report import RunSeeds
from keras_stab.diagnostics.report import StabilityReport
from keras_stab.diagnostics.report import compare_scores
from keras_stab.diagnostics.report import seeds_needed
from keras_stab.diagnostics.report import stability_report

__all__ = [
    "ArmSummary",
    "Comparison",
    "GradientGroups",
    "Interval",
    "Landscape",
    "RunSeeds",
    "Sharpness",
    "StabilityReport",
    "compare_scores",
    "group_gradients",
    "loss_landscape",
    "plot_loss_landscape",
    "seeds_needed",
    "sharpness",
    "stability_report",
]


def __dir__():
    return __all__
