"""A stability report as text, on the terminal and as Markdown."""

import textwrap

import keras

from keras_stab import tables
from keras_stab._version import __version__
from keras_stab.diagnostics import power
from keras_stab.diagnostics import words

ARMS = (
    "Arm",
    ">Mean",
    ">Deviation",
    ">(interval)",
    ">Failed",
    ">Agreement",
    ">Test-set floor",
    ">Flip floor",
    ">Seconds",
)
PAIRS = ("Comparison", "Figure", ">Estimate", ">Interval", ">Resampled")
# From "all but sure to be seen" to "hardly worth the runs".
SEEDS_FOR = (2.0, 1.0, 0.5, 0.25)

NOTES = """\
- **Deviation**: standard deviation of the scores over the seeds, with its
  95 % interval.
- **Failed**: runs without a finite score, or not better than the
  `failure_score`.
- **Agreement**: share of test rows for which two runs of the arm predict the
  same class, mean over all pairs of runs.
- **Test-set floor**: what the score of one fixed model scatters by when a test
  set of this size is drawn anew (binomial). A smaller difference may be one of
  this test set alone.
- **Flip floor**: the deviation between runs if they only disagreed row by row,
  each row for itself. A larger test set makes it smaller. A deviation well
  above it means that some runs are better than others as a whole.
- **Interval**: of the paired t-test for the difference, of Pitman and Morgan
  for the ratio of standard deviations. **Resampled**: from resampled pairs
  (BCa).
- **Cannot tell** is no proof that the arms are the same: these runs do not
  show which one is better."""


def arm_rows(report):
    """Rows of strings under the titles `ARMS`."""
    rows = []
    for arm, own in report.arms.items():
        count = len(report.runs[arm])
        digits = 2 if own.deviation is None else words.decimals(own.deviation)

        def show(value):
            return "" if value is None else f"{value:.{digits}f}"

        span = own.deviation and (
            f"{show(own.deviation.low)} to {show(own.deviation.high)}"
        )
        rows.append(
            (
                arm,
                show(own.mean),
                show(own.deviation and own.deviation.value),
                span or "",
                f"{own.failed} of {count}",
                "" if own.agreement is None else f"{100 * own.agreement:.1f} %",
                show(own.binomial_floor),
                show(own.flip_floor),
                f"{own.seconds:.1f}",
            )
        )
    return rows


def pair_rows(report):
    """Rows of strings under the titles `PAIRS`."""
    rows = []
    for arm, own in report.comparisons.items():
        level = f" ({words.percent(own.level)})"
        label = f"{arm} minus {own.baseline}"
        for name, interval, resampled, sign in (
            ("mean difference", own.difference, own.difference_resampled, "+"),
            ("ratio of deviations", own.ratio, own.ratio_resampled, ""),
        ):
            if interval is None:
                rows.append((label, name, "", "", ""))
                continue
            digits = words.decimals(interval) if sign else 2
            rows.append(
                (
                    label if sign else f"{arm} over {own.baseline}",
                    name,
                    words.number(interval.value, digits, sign),
                    words.span(interval, digits) + level,
                    words.span(resampled, digits) if resampled else "",
                )
            )
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
        f"{keras.version()} on {keras.backend.backend()}, keras_stab "
        f"{__version__}"
    )


def as_text(report):
    parts = [heading(report), tables.as_text(ARMS, arm_rows(report))]
    if report.comparisons:
        parts += [
            tables.as_text(PAIRS, pair_rows(report)),
            "\n".join(
                textwrap.fill(line, 80) for line in report.verdict.split("\n")
            ),
        ]
    return "\n\n".join(parts)


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
        parts.append(
            f"All intervals hold together with {words.percent(report.level)} "
            "confidence."
        )
    parts += ["## Arms", _table(ARMS, arm_rows(report))]
    if report.comparisons:
        parts += ["## Comparisons", _table(PAIRS, pair_rows(report))]
    if seeds_rows(report):
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
