"""The charts of a stability report, drawn by matplotlib."""

import textwrap

import numpy as np

from keras_stab.diagnostics.extras import extra

COLORS = ("#4477aa", "#cc5511", "#228833", "#aa3377", "#ccaa22", "#66ccee")


def draw_all(report):
    """Draws the charts for which there are figures.

    Returns:
        List of pairs of a title and a file's name in the report's folder.
    """
    drawn = [("Scores, one line per seed", "scores.png")]
    _save(draw_scores, report, report.folder / "scores.png", height=4.8)
    if _columns(report):
        drawn.append(("Intervals of the comparisons", "intervals.png"))
        height = 1.8 + 0.8 * len(report.comparisons)
        _save(draw_intervals, report, report.folder / "intervals.png", height)
    return drawn


def _save(draw, report, path, height):
    # Not pyplot: it would choose a window system and keep the figure.
    figure = extra("matplotlib.figure", "A picture").Figure(
        figsize=(9, height), layout="constrained"
    )
    draw(report, figure)
    figure.savefig(path, dpi=150)


def draw_scores(report, figure):
    """All scores, arm beside arm; a line connects those of a seed."""
    axes = figure.subplots()
    scores = np.array([report.scores(arm) for arm in report.runs])
    places = np.arange(len(scores))
    for own in scores.T:
        # A failed run interrupts the line.
        axes.plot(places, own, color="0.75", linewidth=1, zorder=1)
    for place, (arm, own) in enumerate(zip(report.runs, scores)):
        color = COLORS[place % len(COLORS)]
        axes.scatter(np.full(own.shape, place), own, color=color, s=24)
        summary = report.arms[arm]
        if summary.mean is None:
            continue
        # Beside the runs, so that neither hides the other.
        axes.errorbar(
            place + 0.16,
            summary.mean,
            yerr=summary.deviation and summary.deviation.value,
            color=color,
            marker="D",
            capsize=4,
        )
        if summary.binomial_floor:
            axes.errorbar(
                place + 0.24,
                summary.mean,
                yerr=summary.binomial_floor,
                color="0.45",
                linestyle="none",
                capsize=3,
                label="Test-set floor" if not place else None,
            )
    axes.set_xlim(-0.5, len(scores) - 0.5)
    axes.set_xticks(places, [_tick(report, arm) for arm in report.runs])
    axes.set_ylabel(report.metric)
    axes.set_title(
        "A dot per run, a line per seed; diamond: mean and standard deviation",
        fontsize=11,
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", framealpha=0.9, edgecolor="none")
    _tidy(axes, "y")


def _tick(report, arm):
    failed = report.arms[arm].failed
    label = textwrap.fill(arm, 18)
    return f"{label}\n({failed} failed)" if failed else label


def _columns(report):
    """The intervals that there are: of mean differences, of ratios."""
    return [
        name
        for name in ("difference", "ratio")
        if any(getattr(own, name) for own in report.comparisons.values())
    ]


def draw_intervals(report, figure):
    """Mean differences on the left, ratios of deviations on the right."""
    names = _columns(report)
    columns = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    pairs = list(report.comparisons.values())
    rows = np.arange(len(pairs))[::-1]
    baseline = pairs[0].baseline
    for name, axes in zip(names, columns):
        _draw_column(axes, rows, pairs, name)
        if name == "ratio":
            axes.set_xlabel(f"Standard deviation over that of {baseline}")
            axes.set_xscale("log")
            _plain_ticks(axes)
        else:
            unit = f" ({report.unit})" if report.unit else ""
            axes.set_xlabel(f"{report.metric} minus that of {baseline}{unit}")
        _tidy(axes, "x")
    columns[0].set_yticks(rows, [textwrap.fill(pair.arm, 18) for pair in pairs])
    columns[0].set_ylim(-0.6, len(pairs) - 0.4)
    figure.legend(
        *columns[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )


def _draw_column(axes, rows, pairs, name):
    neutral = {"difference": 0.0, "ratio": 1.0}[name]
    axes.axvline(neutral, color="0.4", linewidth=1, linestyle="--")
    for kind, offset, color, label in (
        (name, 0.1, COLORS[0], "paired test"),
        (f"{name}_resampled", -0.1, COLORS[1], "resampled pairs"),
    ):
        for row, pair in zip(rows, pairs):
            interval = getattr(pair, kind)
            if interval is None:
                continue
            axes.errorbar(
                interval.value,
                row + offset,
                xerr=[
                    [interval.value - interval.low],
                    [interval.high - interval.value],
                ],
                color=color,
                marker="o",
                capsize=4,
                label=label,
            )
            label = None


def _plain_ticks(axes):
    """`0.5` in place of a power of ten."""
    ticker = extra("matplotlib.ticker", "A picture")
    low, high = axes.get_xlim()
    marks = [0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100]
    axes.set_xticks([mark for mark in marks if low <= mark <= high])
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _tidy(axes, direction):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=direction, color="0.9")
    axes.set_axisbelow(True)
