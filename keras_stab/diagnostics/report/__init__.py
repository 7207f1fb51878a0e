"""A run-to-run study: the same training with several seeds, compared."""

from keras_stab.diagnostics.report.comparison import compare_scores
from keras_stab.diagnostics.report.power import seeds_needed
from keras_stab.diagnostics.report.report import stability_report

__all__ = [
    "compare_scores",
    "seeds_needed",
    "stability_report",
]


def __dir__():
    return __all__
