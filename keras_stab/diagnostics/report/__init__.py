"""A run-to-run study: the same training with several seeds, compared."""

from keras_stab.diagnostics.report.arm_summary import ArmSummary
from keras_stab.diagnostics.report.comparison import Comparison
from keras_stab.diagnostics.report.comparison import compare_scores
from keras_stab.diagnostics.report.findings import StabilityReport
from keras_stab.diagnostics.report.power import seeds_needed
from keras_stab.diagnostics.report.report import stability_report
from keras_stab.diagnostics.report.run_plan import RunSeeds
from keras_stab.diagnostics.report.statistics import Interval

__all__ = [
    "ArmSummary",
    "Comparison",
    "Interval",
    "RunSeeds",
    "StabilityReport",
    "compare_scores",
    "seeds_needed",
    "stability_report",
]


def __dir__():
    return __all__
