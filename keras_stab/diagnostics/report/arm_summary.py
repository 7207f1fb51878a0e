"""What the runs of one arm show."""

import dataclasses

import numpy as np

from keras_stab.diagnostics.report import agreement
from keras_stab.diagnostics.report import statistics
from keras_stab.diagnostics.report.statistics import Interval


@dataclasses.dataclass(frozen=True)
class ArmSummary:
    """The runs of one arm.

    Attributes:
        mean: Float, mean score; `None` without scores.
        deviation: `Interval` of the standard deviation of the scores; `None`
            for fewer than two.
        failed: Int, failed runs.
        failed_rate: `Interval` of the share of failed runs, from 0 to 1.
        agreement: Float, share of test rows on which two runs agree.
        binomial_floor: Float, deviation of the score over new test sets.
        flip_floor: Float, deviation between runs if they disagreed only about
            single rows, independently.
        seconds: Float, median duration of a run.

    Figures that the results of the runs do not give are `None`.
    """

    mean: float | None
    deviation: Interval | None
    failed: int
    failed_rate: Interval
    agreement: float | None
    binomial_floor: float | None
    flip_floor: float | None
    seconds: float


def summarise(runs, scores, failed, test_rows):
    """The `ArmSummary` of an arm.

    Args:
        runs: List of its records.
        scores: Array of their scores, NaN where there is none.
        failed: Booleans, the failed runs.
        test_rows: Int, of the test set, or `None`.
    """
    usable = scores[np.isfinite(scores)]
    judged = [
        run for run in runs if run["failure"] is None and run["predictions"]
    ]
    floors = _floors(judged, usable, test_rows)
    return ArmSummary(
        mean=float(usable.mean()) if len(usable) else None,
        deviation=(
            statistics.deviation_interval(usable) if len(usable) > 1 else None
        ),
        failed=int(failed.sum()),
        failed_rate=statistics.rate_interval(failed.sum(), len(failed)),
        agreement=(
            agreement.prediction_agreement(_same_length(judged))
            if len(judged) > 1
            else None
        ),
        binomial_floor=floors[0],
        flip_floor=floors[1],
        seconds=float(np.median([run["seconds"] for run in runs])),
    )


def _floors(runs, scores, test_rows):
    """Both floors in the unit of the score, `None` where unknown."""
    if not len(scores):
        return None, None
    # Shares from 0 to 1, or percentages.
    scale = 100.0 if scores.max() > 1.0 else 1.0
    right = None
    if len(runs) == len(scores) and all(run["targets"] for run in runs):
        predictions = np.array(_same_length(runs))
        right = predictions == np.array([run["targets"] for run in runs])
        # Only then are the floors about this score.
        if not np.allclose(
            right.mean(axis=1) * scale, scores, atol=1e-4 * scale
        ):
            right = None
    flip = None
    if right is not None:
        test_rows = right.shape[1]
        if len(right) > 1:
            flip = scale * agreement.flip_floor(right)
    share = float(scores.mean()) / scale
    if test_rows is None or not 0 <= share <= 1:
        return None, flip
    return scale * agreement.binomial_floor(share, test_rows), flip


def _same_length(runs):
    predictions = [run["predictions"] for run in runs]
    if len({len(own) for own in predictions}) > 1:
        raise ValueError(
            f"The runs of arm {runs[0]['arm']!r} have predictions for "
            f"different numbers of rows: {[len(own) for own in predictions]}. "
            "All runs must predict the same rows."
        )
    return predictions
