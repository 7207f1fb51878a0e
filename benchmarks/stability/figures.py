"""The figures of the page, from the files of results alone."""

import dataclasses
import json

import numpy as np

import keras_stab

BAD_SHARE = 0.1
RESAMPLES = 9999


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm of one task against the base.

    Attributes:
        arm: String, key of the arm.
        mean: Float, of the arm's scores.
        deviation: Float, standard deviation of the arm's scores.
        comparison: `keras_stab.Comparison` with the base; `None` for the base.
        above_floor: Float, ratio of the deviations above the floor that the
            finite test set gives; `None` where that is not known.
        bad: Float, the score that a tenth of the runs does not reach.
        bad_difference: Tuple of the difference of it from the base's and the
            two ends of its interval; `None` for the base.
        failed: Int, failed runs.
        disagreement: Float, share of test rows on which two runs disagree.
        cost: Float, time of the processor for a run, over the base's.
        rate: Float, the rate that the search picked.
        at_edge: Whether it is the smallest or the largest of the search.
    """

    arm: str
    mean: float
    deviation: float
    comparison: object
    above_floor: float | None
    bad: float
    bad_difference: tuple | None
    failed: int
    disagreement: float | None
    cost: float
    rate: float
    at_edge: bool


def read(folder):
    """All files of results, by task, in the order of the catalogue."""
    from stability import catalogue

    found = {}
    for name in catalogue.TASKS:
        path = folder / f"{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
    return found


def rows(results, spread="everything"):
    """The `Row`s of a task, its base first.

    Args:
        results: The contents of one file.
        spread: `"everything"` or `"order"`.
    """
    arms = results["spreads"][spread]["arms"]
    return [row(results, arms, arm) for arm in arms]


def row(results, arms, arm):
    higher = results["higher_is_better"]
    first = next(iter(arms))
    base, own = (scores_of(arms[key]) for key in (first, arm))
    comparison = bad_difference = None
    if arm != first:
        comparison = keras_stab.compare_scores(
            base,
            own,
            names=(first, arm),
            comparisons=len(arms) - 1,
            higher_is_better=higher,
            unit=results["unit"],
            resamples=RESAMPLES,
        )
        bad_difference = bad_interval(base, own, higher, len(arms) - 1)
    finite = own[np.isfinite(own)]
    agreement = arms[arm]["agreement"]
    rate = results["rates"][arm]
    return Row(
        arm=arm,
        mean=float(finite.mean()),
        deviation=float(finite.std(ddof=1)),
        comparison=comparison,
        above_floor=above_floor(arms[first], arms[arm]),
        bad=float(bad_score(own, higher)),
        bad_difference=bad_difference,
        failed=arms[arm]["failed"],
        disagreement=None if agreement is None else 1 - agreement,
        cost=arms[arm]["cpu_seconds"] / arms[first]["cpu_seconds"],
        rate=rate,
        at_edge=arm in results["tuning"]
        and rate in (min(results["grid"]), max(results["grid"])),
    )


def scores_of(arm):
    """Array of the scores of an arm, NaN for failed runs."""
    return np.array([np.nan if s is None else s for s in arm["scores"]])


def bad_score(scores, higher):
    """The score that a tenth of the runs does not reach; NaN counts as bad.

    Args:
        scores: Array `(..., runs)`.
        higher: Whether higher is better.

    Returns:
        Array `(...)`.
    """
    worst = -np.inf if higher else np.inf
    return np.quantile(
        np.where(np.isfinite(scores), scores, worst),
        BAD_SHARE if higher else 1 - BAD_SHARE,
        axis=-1,
        # Of sorted scores, so that one failed run does not make it infinite.
        method="lower" if higher else "higher",
    )


def bad_interval(base, own, higher, comparisons, level=0.95):
    """Difference of the bad scores, with percentiles of resampled pairs."""
    random = np.random.default_rng(0)
    picks = random.integers(len(base), size=(RESAMPLES, len(base)))
    with np.errstate(invalid="ignore"):
        differences = bad_score(own[picks], higher) - bad_score(
            base[picks], higher
        )
    tail = (1 - level) / comparisons / 2
    low, high = np.nanquantile(differences, (tail, 1 - tail))
    value = bad_score(own, higher) - bad_score(base, higher)
    return float(value), float(low), float(high)


def above_floor(base, own):
    """Ratio of what is left of the deviations beyond their floors."""
    if base["flip_floor"] is None or own["flip_floor"] is None:
        return None
    left = [
        np.nanvar(scores_of(arm), ddof=1) - arm["flip_floor"] ** 2
        for arm in (base, own)
    ]
    # Below the floor there is nothing to divide by.
    if left[0] <= 0:
        return None
    return float(np.sqrt(max(left[1], 0.0) / left[0]))
