"""The picture of the page: intervals of all arms, one column for each task."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stability import titles

BETTER, WORSE, UNKNOWN = "#4477aa", "#cc5511", "0.55"
COLORS = {
    "better": BETTER,
    "steadier": BETTER,
    "worse": WORSE,
    "less steady": WORSE,
}
PANELS_IN_A_ROW = 6


def draw(tasks, path):
    """Draws mean differences and ratios of deviations.

    Args:
        tasks: Dict from task to a pair of its results and its `Row`s.
        path: Where to write the picture.
    """
    arms = titles.arms_in(own for _, own in tasks.values())
    places = {arm: -place for place, arm in enumerate(arms)}
    names = list(tasks)
    bands = [
        names[start : start + PANELS_IN_A_ROW]
        for start in range(0, len(names), PANELS_IN_A_ROW)
    ]
    widest = max(map(len, bands))
    figure = Figure(
        figsize=(2.4 + 2.0 * widest, 2 * len(bands) * (0.7 + 0.2 * len(arms))),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(2 * len(bands), widest, squeeze=False, sharey=True)
    for band, own in enumerate(bands):
        for column in range(widest):
            pair = grid[2 * band][column], grid[2 * band + 1][column]
            if column >= len(own):
                for axes in pair:
                    axes.set_axis_off()
                continue
            results, rows = tasks[own[column]]
            _draw_task(pair, results, rows, places)
        for axes in (grid[2 * band][0], grid[2 * band + 1][0]):
            axes.set_yticks(list(places.values()), map(titles.short, arms))
    figure.savefig(path, dpi=110)


def _draw_task(pair, results, rows, places):
    above, below = pair
    above.set_title(titles.task(results), fontsize=9)
    for axes, reference, question in ((above, 0, "mean"), (below, 1, "spread")):
        axes.axvline(reference, color="0.3", linewidth=0.8)
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.tick_params(axis="x", labelsize=8)
        for row in rows:
            if row.comparison is not None:
                _draw_row(axes, row.comparison, places[row.arm], question)
    better = "right" if results["higher_is_better"] else "left"
    unit = results["unit"] or results["metric"]
    above.set_xlabel(f"mean difference ({unit}),\n{better} is better", size=8)
    below.set_xscale("log")
    below.set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
    below.minorticks_off()
    below.set_xlim(0.3, 3.4)
    below.set_xlabel("ratio of deviations,\nleft is steadier", size=8)


def _draw_row(axes, comparison, place, question):
    interval = comparison.difference if question == "mean" else comparison.ratio
    if interval is None:
        return
    color = COLORS.get(comparison.answers[question], UNKNOWN)
    axes.plot([interval.low, interval.high], [place, place], color=color)
    axes.plot(interval.value, place, "o", color=color, markersize=3.5)
