"""A stability report as text, on the terminal and as Markdown."""

import math
import textwrap

import keras

from keras_stab import text_table
from keras_stab._version import __version__
from keras_stab.backend import devices
from keras_stab.diagnostics.report import power
from keras_stab.diagnostics.report import words

ARMS = (
    "Arm",
    ">Mean ± deviation",
    ">Interval of deviation",
    ">Failed",
    ">Agreement",
    ">Test-set floor",
    ">Flip floor",
    ">Seconds",
)
PAIRS = (
    "Arm against baseline",
    ">Difference",
    ">Interval",
    ">Resampled",
    ">Ratio of deviations",
    ">Interval",
    ">Resampled",
)
# What a terminal has no room for.
LONG = {"Interval of deviation", "Resampled"}
# From "all but sure to be seen" to "hardly worth the runs".
SEEDS_FOR = (2.0, 1.0, 0.5, 0.25)

NOTES = """\
- **Mean ± deviation**: of the scores over the seeds; the standard deviation
  with its 95 % interval.
- **Failed**: runs without a finite score, or not better than the
  `failure_score`.
- **Agreement**: share of test rows for which two runs of the arm predict the
  same class, mean over all pairs of runs.
- **Test-set floor**: the standard deviation of the score of one fixed model
  over new test sets of this size (binomial). A smaller difference may hold for
  this test set only.
- **Flip floor**: the deviation between runs if they disagreed only about single
  rows, independently. A larger test set makes it smaller. A deviation well
  above it means that some runs are better than others as a whole.
- **Interval**: of the paired t-test for the difference, of Pitman and Morgan
  for the ratio of standard deviations. **Resampled**: from resampled pairs
  (BCa).
- **Cannot tell** does not mean that the arms are the same: these runs do not
  show which one is better."""


def arm_rows(report):
    """Rows of strings under the titles `ARMS`."""
    arms = report.arms.values()
    deviations = [own.deviation.value for own in arms if own.deviation]
    # Two figures of the smallest deviation.
    least = min((d for d in deviations if d > 0), default=0.1)
    digits = max(0, 1 - math.floor(math.log10(least)))

    def show(value):
        return "" if value is None else f"{value:.{digits}f}"

    return [
        (
            arm,
            show(own.mean)
            + (f" ± {show(own.deviation.value)}" if own.deviation else ""),
            words.span(own.deviation, digits) if own.deviation else "",
            f"{own.failed} of {len(report.runs[arm])}",
            "" if own.agreement is None else f"{100 * own.agreement:.1f} %",
            show(own.binomial_floor),
            show(own.flip_floor),
            f"{own.seconds:.1f}",
        )
        for arm, own in report.arms.items()
    ]


def pair_rows(report):
    """Rows of strings under the titles `PAIRS`."""
    rows = []
    for arm, own in report.comparisons.items():
        row = [f"{arm} against {own.baseline}"]
        for interval, resampled, sign in (
            (own.difference, own.difference_resampled, "+"),
            (own.ratio, own.ratio_resampled, ""),
        ):
            if interval is None:
                row += ["", "", ""]
                continue
            digits = words.decimals(interval) if sign else 2
            row += [
                words.number(interval.value, digits, sign),
                words.span(interval, digits),
                words.span(resampled, digits) if resampled else "",
            ]
        rows.append(row)
    return rows


def seeds_rows(report):
    """How many seeds find which difference: comparison, then counts."""
    rows = []
    for arm, own in report.comparisons.items():
        if own.detectable:
            digits = words.decimals(own.difference)
            rows.append(
                (
                    f"{arm} minus {own.baseline}",
                    *(
                        f"{size:.{digits}f}: {count}"
                        for size, count in own.seeds_table(SEEDS_FOR)
                    ),
                )
            )
    return rows


def heading(report):
    count = len(next(iter(report.runs.values())))
    better = "higher" if report.higher_is_better else "lower"
    return (
        f"{report.metric} ({better} is better) of {count} paired seeds; Keras "
        f"{keras.version()} on {devices.backend_name()}, keras_stab "
        f"{__version__}"
    )


def for_terminal(report):
    """What `print` shows of a report."""
    parts = [heading(report), _short_table(ARMS, arm_rows(report))]
    if report.comparisons:
        parts += [
            _short_table(PAIRS, pair_rows(report)),
            "\n".join(
                textwrap.fill(line, 80) for line in report.verdict.split("\n")
            ),
            _together(report),
        ]
    return "\n\n".join(parts)


def _together(report):
    return (
        "The intervals of the comparisons hold together with "
        f"{words.percent(report.level)} confidence."
    )


def _short_table(titles, rows):
    kept = [
        place
        for place, title in enumerate(titles)
        if title.removeprefix(">") not in LONG
    ]
    return text_table.as_text(
        [titles[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
    )


def as_markdown(report, pictures):
    """The file `report.md`.

    Args:
        report: `StabilityReport`.
        pictures: List of pairs of a title and a file's name.
    """
    parts = ["# Stability report", heading(report) + "."]
    if report.comparisons:
        parts += ["## Verdict"]
        parts += [
            textwrap.fill(line, 80) for line in report.verdict.split("\n")
        ]
        parts.append(_together(report))
    parts += ["## Arms", _table(ARMS, arm_rows(report))]
    if report.comparisons:
        parts += ["## Comparisons", _table(PAIRS, pair_rows(report))]
    if any(own.difference for own in report.comparisons.values()):
        titles = ("Comparison", *(f"{size:g} s" for size in SEEDS_FOR))
        parts += [
            "## How many seeds",
            "Seeds that find a mean difference four times in five; s is the "
            "standard deviation of the differences, seed by seed.",
            _table(titles, seeds_rows(report)),
            "\n".join(_seeds_for_spread(report)),
        ]
    failures = _failures(report)
    if failures:
        parts += ["## Failed runs", failures]
    parts += [f"![{title}]({name})" for title, name in pictures]
    parts += ["## How to read this", NOTES]
    return "\n\n".join(parts) + "\n"


def _seeds_for_spread(report):
    for arm, own in report.comparisons.items():
        if own.ratio is None:
            continue
        count = power.seeds_needed_for_ratio(
            0.5, own.correlation, level=own.level
        )
        yield (
            f"- That {arm} halves the standard deviation of {own.baseline} "
            f"would take about {count} seeds to see."
        )


def _failures(report):
    return "\n".join(
        f"- {arm}, seeds {tuple(run['seeds'])}: {run['failure']}"
        for arm, own in report.runs.items()
        for run in own
        if run["failure"] is not None
    )


def _table(titles, rows):
    """A table of Markdown."""
    lines = [
        [title.removeprefix(">") for title in titles],
        ["---:" if title.startswith(">") else "---" for title in titles],
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
