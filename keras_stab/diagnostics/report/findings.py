"""What the runs of all arms show together."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_stab.diagnostics.report import charts
from keras_stab.diagnostics.report import text
from keras_stab.diagnostics.report.arm_summary import ArmSummary
from keras_stab.diagnostics.report.arm_summary import summarise
from keras_stab.diagnostics.report.comparison import Comparison
from keras_stab.diagnostics.report.comparison import compare_scores
from keras_stab.diagnostics.report.run_files import without_nan
from keras_stab.diagnostics.report.run_files import write_atomically
from keras_stab.diagnostics.report.statistics import Interval


@dataclasses.dataclass(frozen=True)
class StabilityReport:
    """What `keras_stab.stability_report` found; `print` it.

    Attributes:
        metric: String, the name of the compared number.
        higher_is_better: Boolean.
        level: Float, the confidence with which all intervals hold together.
        unit: String.
        runs: Dict from arm to its runs, in the order of the seeds: dicts with
            `seeds`, `metrics`, `curves`, `predictions`, `targets`, `failure`
            and `seconds`.
        arms: Dict from arm to `ArmSummary`.
        comparisons: Dict from every arm but the first to its `Comparison`
            with the first.
        verdict: String, all verdicts, one per line.
        folder: Path of `report.md`, `report.json` and the pictures.
    """

    metric: str
    higher_is_better: bool
    level: float
    unit: str
    runs: dict[str, list[dict[str, Any]]]
    arms: dict[str, ArmSummary]
    comparisons: dict[str, Comparison]
    folder: pathlib.Path

    @classmethod
    def from_runs(
        cls,
        runs: dict[str, list[dict[str, Any]]],
        folder: pathlib.Path,
        metric: str | None,
        level: float,
        questions: Sequence[str],
        higher_is_better: bool | None,
        relevant_difference: float | None,
        failure_score: float | None,
        test_rows: int | None,
        unit: str,
    ) -> "StabilityReport":
        """Compares finished runs.

        Args:
            runs: Dict from arm to its runs, in the order of the seeds.
            folder: Path to write to.
            metric, level, questions, higher_is_better, relevant_difference,
                failure_score, test_rows, unit: As for `stability_report`.
        """
        for own in runs.values():
            for run in own:
                metric = pick_metric(run, metric)
        name = metric or "score"
        if higher_is_better is None:
            lower = ("loss", "error")
            higher_is_better = not any(word in name.lower() for word in lower)
        sign = 1 if higher_is_better else -1
        scores = {
            arm: np.array([_score(run, name) for run in own])
            for arm, own in runs.items()
        }
        failed = {arm: ~np.isfinite(own) for arm, own in scores.items()}
        if failure_score is not None:
            for arm in scores:
                failed[arm] |= sign * scores[arm] <= sign * failure_score
        baseline = next(iter(runs))
        return cls(
            metric=name,
            higher_is_better=higher_is_better,
            level=level,
            unit=unit,
            runs=runs,
            arms={
                arm: summarise(runs[arm], scores[arm], failed[arm], test_rows)
                for arm in runs
            },
            comparisons={
                arm: compare_scores(
                    scores[baseline],
                    scores[arm],
                    names=(baseline, arm),
                    level=level,
                    questions=questions,
                    comparisons=len(runs) - 1,
                    higher_is_better=higher_is_better,
                    relevant_difference=relevant_difference,
                    unit=unit,
                    failed=(failed[baseline], failed[arm]),
                )
                for arm in runs
                if arm != baseline
            },
            folder=folder,
        )

    @property
    def verdict(self) -> str:
        return "\n".join(
            " ".join(filter(None, (own.verdict, self._caution(own))))
            for own in self.comparisons.values()
        )

    def _caution(self, comparison):
        """A caution about a difference that other test rows may not show."""
        floor = self.arms[comparison.baseline].binomial_floor
        if floor is None or comparison.answers.get("mean") not in (
            "better",
            "worse",
        ):
            return None
        size = abs(comparison.difference.value)
        if size >= floor:
            return None
        return (
            "The difference is smaller than the deviation of an accuracy over "
            f"new test sets of this size ({floor:.2g}): it may hold for these "
            "test rows only."
        )

    def scores(self, arm: str) -> np.ndarray:
        """Array of an arm's scores, NaN where a run failed."""
        return np.array([_score(run, self.metric) for run in self.runs[arm]])

    def column(self, arm: str, name: str) -> np.ndarray:
        """Array of a number or a list that the runs of an arm returned.

        Runs that failed before they returned it are left out.
        """
        values = [{**run["metrics"], **run["curves"]} for run in self.runs[arm]]
        return np.array([own[name] for own in values if name in own])

    def __str__(self) -> str:
        return text.for_terminal(self)

    def as_dict(self) -> dict[str, Any]:
        """All figures and all scores, as `report.json` holds them."""
        return without_nan(
            {
                "metric": self.metric,
                "higher_is_better": self.higher_is_better,
                "level": self.level,
                "verdict": self.verdict,
                "arms": _plain(self.arms),
                "comparisons": _plain(self.comparisons),
                "runs": [
                    {
                        key: run[key]
                        for key in ("arm", "seeds", "metrics", "failure")
                    }
                    for own in self.runs.values()
                    for run in own
                ],
                "configuration": {
                    arm: own[0]["configuration"]
                    for arm, own in self.runs.items()
                },
            }
        )

    def write(self, pictures: bool) -> None:
        """Writes the report to its folder; also draws it, if `pictures`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        drawn = charts.draw_all(self) if pictures else []
        write_atomically(
            self.folder / "report.json",
            json.dumps(self.as_dict(), indent=1) + "\n",
        )
        write_atomically(
            self.folder / "report.md", text.as_markdown(self, drawn)
        )


def pick_metric(run, metric):
    """Name of the number to compare.

    Args:
        run: The record of a run.
        metric: The name for the runs before this one; `None` if it is not
            known yet.

    Returns:
        `metric`, or the name of the only number of this run; `None` if it is
        still not known, because the run failed.
    """
    names = list(run["metrics"])
    if metric in names or not names:
        return metric
    if metric is None and len(names) == 1:
        return names[0]
    reason = (
        "`build_and_fit` returned several numbers: say which one to compare, "
        "with `metric=`"
        if metric is None
        else f"`build_and_fit` returned no {metric!r}, which is compared"
    )
    raise ValueError(
        f"{reason}. Received: {', '.join(map(repr, names))} from the run of "
        f"arm {run['arm']!r} with seeds {tuple(run['seeds'])}"
    )


def _score(run, name):
    if run["failure"] is not None:
        return math.nan
    return run["metrics"][name]


def _plain(summaries):
    """Dataclasses as dicts, intervals as dicts by name."""
    return {
        name: {
            field.name: (
                value._asdict() if isinstance(value, Interval) else value
            )
            for field in dataclasses.fields(summary)
            for value in [getattr(summary, field.name)]
        }
        for name, summary in summaries.items()
    }
