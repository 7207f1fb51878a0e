"""What several guides use: intervals, progress bars, arguments, axes."""

import argparse

import numpy as np
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn
from scipy import stats


def paired_interval(a, b, level=0.95):
    """Mean of `b - a` with its t-interval.

    Args:
        a: Results of the first arm, one per seed; at least two.
        b: Results of the second arm, in the same order.
        level: Float, the confidence.

    Returns:
        Tuple of floats: mean difference, lower end, upper end.
    """
    differences = np.subtract(b, a, dtype="float64")
    count = len(differences)
    if count < 2:
        raise ValueError(
            f"An interval needs at least two pairs. Received: {count} pair(s)"
        )
    mean = differences.mean()
    half = (
        stats.t.ppf((1 + level) / 2, count - 1)
        * differences.std(ddof=1)
        / np.sqrt(count)
    )
    return float(mean), float(mean - half), float(mean + half)


def epochs_bar(console):
    """A progress bar that counts epochs."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
        console=console,
    )


def spread(values):
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def plot_band(axes, curves, color, **style):
    """Mean and standard deviation of runs, over the epochs.

    Args:
        axes: Axes of matplotlib.
        curves: Array of shape `(runs, epochs)`.
        color: Of line and band.
        **style: Of the line.
    """
    epochs = np.arange(1, curves.shape[1] + 1)
    mean, deviation = curves.mean(axis=0), curves.std(axis=0, ddof=1)
    axes.fill_between(
        epochs,
        mean - deviation,
        mean + deviation,
        color=color,
        alpha=0.2,
        linewidth=0,
    )
    # A line of one point would not be seen.
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, mean, color=color, marker=marker, **style)


def tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def at_least(least):
    """For `argparse`: whole numbers from `least` on."""

    def convert(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"at least {least}, please")
        return value

    return convert
