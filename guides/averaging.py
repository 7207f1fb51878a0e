"""
Title: Large steps and averaged weights
Date created: 2026/11/21
Last modified: 2026/11/21
Description: What averaging does in theory, and to a CNN on real images.
Accelerator: NONE
"""

"""
SGD with a large step does not settle: it wanders around a minimum. Its average
does settle, at the minimum of a smoothed objective in which sharp wells are
filled up. The first half of this guide shows that on one-dimensional problems,
the second half asks whether it helps a CNN, at a small, a medium and a large
final step, with and without new batch-norm statistics.

    KERAS_BACKEND=jax python guides/averaging.py --data FOLDER

The folder must hold `fashion_mnist.npz` with the arrays `x_train`, `y_train`,
`x_test` and `y_test`. Three pictures and a table come out.

On JAX, with the default settings, the last weights were right for 86.4, 85.9
and 84.4 % of the test images at the final rates 0.001, 0.02 and 0.1 (means of
three seeds); their averages, with new statistics, for 86.4, 86.8 and 87.1 %.
The larger the final step, the worse its last weights and the better their
average. New statistics made no clear difference here (0.0, -0.1, +0.1 points).

What the result does not say: the CNN is small, the data are few and three
seeds are not many. Read the spread before the means.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import argparse
import json
import pathlib

import keras
import numpy as np
from guide_tools import Shuffled
from guide_tools import Start
from guide_tools import prepared
from guide_tools import read_fashion_mnist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_stab

BLUE, ORANGE, GREEN = "#4477aa", "#cc5511", "#228833"

"""
## The smoothed objective

One step of SGD is `w - rate (f'(w) + noise)`. Look at `v = w - rate f'(w)`, the
point before the noise is added: on average it descends on
`F(v) = E f(v - rate noise)`, which is f smoothed over the reach of one noisy
step. Here f is a wide bowl with a sharp and deeper well at 2.
"""


def well(x):
    return 0.1 * x**2 - 0.9 * np.exp(-((x - 2.0) ** 2) / 0.02)


def well_slope(x):
    return 0.2 * x + 90.0 * (x - 2.0) * np.exp(-((x - 2.0) ** 2) / 0.02)


def smoothed(function, x, rate):
    """`E function(x - rate noise)`, as a sum over a fine grid of noise."""
    nodes = np.linspace(-7.0, 7.0, 2001)
    weights = np.exp(-(nodes**2) / 2)
    weights = weights / weights.sum()
    return function(x[:, None] - rate * nodes) @ weights


def chains(slope, rate, start, count, steps, seed):
    """Last weights of many runs of SGD, and averages of their second halves."""
    random = np.random.default_rng(seed)
    w = np.full(count, start)
    average = np.zeros(count)
    for t in range(steps):
        w = w - rate * (slope(w) + random.normal(size=count))
        if t >= steps // 2:
            average += (w - average) / (t - steps // 2 + 1)
    return w, average


def draw_well(steps, count, path):
    """The smoothed objective, and where SGD and its average end."""
    figure, (left, right) = new_figure(1, 2)
    x = np.linspace(-2.5, 3.0, 600)
    rates = (0.02, 0.2, 0.6)
    for rate, colour in zip(rates, (BLUE, GREEN, ORANGE)):
        label = f"smoothed, rate {rate}"
        left.plot(x, smoothed(well, x, rate), color=colour, label=label)
    left.plot(x, well(x), ":", color="black", label="objective f")
    left.set_title("Large steps do not see the sharp well")
    left.set(xlabel="weight", ylabel="loss")
    left.legend(frameon=False)
    bins = np.linspace(-2.5, 3.0, 111)
    for rate, colour in ((0.02, BLUE), (0.6, ORANGE)):
        last, average = chains(well_slope, rate, 2.0, count, steps, seed=1)
        for values, style in ((last, "stepfilled"), (average, "step")):
            name = "last" if values is last else "average"
            right.hist(
                values,
                bins,
                weights=np.full(count, 100 / count),
                histtype=style,
                color=colour,
                alpha=0.4 if values is last else 1.0,
                linewidth=1.8,
                label=f"{name}, rate {rate}",
            )
    right.set_yscale("log")
    right.set_title(f"Where {count} runs that start at 2 end")
    right.set(xlabel="weight", ylabel="runs (%)")
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)


"""
## Slopes 1/2 and 1

For `exp(x) - x` the minimum of the smoothed objective is known exactly:
`-rate**2 / 2`. The last weight stays about `rate**(1/2)` away from it, the
average only about `rate`.
"""

RATES = (0.4, 0.2, 0.1, 0.05, 0.025)


def distances(steps, count):
    """RMS distance of the last weight and of the mean average, by rate."""
    rows = []
    for rate in track(RATES, "Chains"):
        last, average = chains(np.expm1, rate, 0.0, count, steps, seed=0)
        centre = -(rate**2) / 2
        v = last - rate * np.expm1(last)
        rms = np.sqrt(np.mean((v - centre) ** 2))
        rows.append((rms, abs(np.mean(average) - centre)))
    return np.array(rows)


def draw_slopes(steps, count, path):
    rows = distances(steps, count)
    slopes = [
        np.polyfit(np.log(RATES[2:]), np.log(column[2:]), 1)[0]
        for column in rows.T
    ]
    figure, axes = new_figure(1, 1)
    names = ("last weight (RMS)", "average (bias)")
    for column, slope, name, colour, power in zip(
        rows.T, slopes, names, (BLUE, ORANGE), (0.5, 1.0)
    ):
        axes.loglog(RATES, column, "o-", color=colour, label=name)
        guide = column[-1] * (np.array(RATES) / RATES[-1]) ** power
        axes.loglog(RATES, guide, ":", color=colour)
        axes.annotate(
            f"slope {slope:.2f}, theory {power:g}",
            (RATES[2], column[2]),
            (8, -16),
            textcoords="offset points",
            color=colour,
        )
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.set_xticks([], minor=True)
    axes.set_title("Distance to the minimum of the smoothed objective")
    axes.set(xlabel="rate", ylabel="distance")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return slopes


"""
## A CNN on real images

Every run starts with rate 0.1, falls along half a cosine to its final rate in
three quarters of the run, and keeps that for the rest, which is averaged.
"""

FINAL_RATES = (0.001, 0.02, 0.1)
FIRST_RATE = 0.1
BATCH = 64
KINDS = ("last", "average, old statistics", "average, new statistics")


def load_images(folder, rows):
    """Training and test images, the first `rows` of a fixed permutation."""
    arrays = read_fashion_mnist(folder)
    order = np.random.default_rng(0).permutation
    images = []
    for part in ("train", "test"):
        pictures, classes = arrays[f"x_{part}"], arrays[f"y_{part}"]
        chosen = order(len(pictures))[:rows]
        images.append(prepared(pictures[chosen], classes[chosen]))
    return images


def make_network():
    layers = keras.layers
    stack = [keras.Input((28, 28, 1))]
    for width in (16, 32, 64):
        stack += [
            layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    return keras.Sequential(stack)


class Contestant:
    """A compiled model of one final rate, trained again for every seed."""

    def __init__(self, final_rate, epochs, steps_per_epoch):
        self.final_rate = final_rate
        self.epochs = epochs
        self.model = make_network()
        self.model.compile(
            keras_stab.AveragedSGD.from_run(
                FIRST_RATE,
                final_learning_rate=final_rate,
                epochs=epochs,
                steps_per_epoch=steps_per_epoch,
                momentum=0.9,
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._start = Start(self.model, make_network)

    def run(self, seed, train, test):
        """Test accuracies in percent, by kind of weights."""
        self._start.rewind(seed)
        self.model.fit(
            Shuffled(*train, BATCH, seed),
            epochs=self.epochs,
            shuffle=False,
            verbose=0,
        )
        accuracies = [self._accuracy(test)]
        # The first without new statistics, on purpose: hence the warning.
        with keras_stab.averaged_weights(self.model):
            accuracies.append(self._accuracy(test))
        with keras_stab.averaged_weights(
            self.model, Shuffled(*train, BATCH, seed), steps=100
        ):
            accuracies.append(self._accuracy(test))
        return accuracies

    def _accuracy(self, test):
        return 100.0 * self.model.evaluate(*test, batch_size=500, verbose=0)[1]


def study(folder, seeds, epochs, rows):
    """Accuracies: [final rate, seed, kind]."""
    train, test = load_images(folder, rows)
    accuracies = np.zeros((len(FINAL_RATES), seeds, len(KINDS)))
    runs = [(i, s) for i in range(len(FINAL_RATES)) for s in range(seeds)]
    contestants = [
        Contestant(rate, epochs, len(train[0]) // BATCH) for rate in FINAL_RATES
    ]
    for i, seed in track(runs, "Training"):
        accuracies[i, seed] = contestants[i].run(seed, train, test)
    return accuracies


def make_table(accuracies):
    table = Table(
        title="Test accuracy in %, mean ± standard deviation of "
        f"{accuracies.shape[1]} seeds ({keras.backend.backend()})"
    )
    table.add_column("Final rate")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for rate, figures in zip(FINAL_RATES, accuracies):
        table.add_row(
            f"{rate:g}",
            *(f"{k.mean():.1f} ± {k.std(ddof=1):.1f}" for k in figures.T),
        )
    return table


def draw_study(accuracies, path):
    figure, axes = new_figure(1, 1)
    places = np.arange(len(FINAL_RATES))
    for kind, (name, colour) in enumerate(zip(KINDS, (BLUE, GREEN, ORANGE))):
        x = places + 0.16 * (kind - 1)
        axes.plot(
            np.repeat(x, accuracies.shape[1]),
            accuracies[:, :, kind].ravel(),
            "o",
            color=colour,
            alpha=0.5,
            markersize=4,
        )
        means = accuracies[:, :, kind].mean(axis=1)
        axes.plot(x, means, "_", color=colour, markersize=18, label=name)
    # Old statistics can ruin a run; the rest should stay legible.
    best = accuracies[:, :, [0, 2]]
    low = max(min(best.min() - 1.0, best.max() - 4.0), 0.0)
    axes.set_ylim(low, best.max() + 0.5)
    title = "A CNN on Fashion-MNIST"
    if accuracies.min() < low:
        title += " (points below the axis are cut off)"
    axes.set_xticks(places, [f"{rate:g}" for rate in FINAL_RATES])
    axes.set_title(title)
    axes.set(xlabel="final rate", ylabel="test accuracy (%)")
    axes.legend(frameon=False, loc="lower center")
    figure.savefig(path, dpi=130)


def new_figure(rows, columns):
    figure = Figure(figsize=(5.6 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


"""
## All together
"""


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Large steps and averaged weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    here = pathlib.Path(__file__).parent / "images"
    add("--data", required=True, help="folder with fashion_mnist.npz")
    add("--output", type=pathlib.Path, default=here, help="for the pictures")
    add("--seeds", type=int, default=3, help="at least 2")
    add("--epochs", type=int, default=12)
    add("--rows", type=int, default=6000, help="images to train on")
    add("--chains", type=int, default=4000, help="runs on a toy")
    add("--steps", type=int, default=8000, help="steps on a toy")
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error("at least two seeds, to show a spread")
    return options


def main(argv=None):
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    draw_well(
        options.steps,
        options.chains // 4,
        options.output / "averaging_well.png",
    )
    slopes = draw_slopes(
        options.steps,
        options.chains,
        options.output / "averaging_slopes.png",
    )
    console.print(
        "Slopes of the distances over the rate: last weight "
        f"{slopes[0]:.2f} (theory 0.5), average {slopes[1]:.2f} (theory 1)"
    )
    accuracies = study(
        options.data, options.seeds, options.epochs, options.rows
    )
    console.print(make_table(accuracies))
    draw_study(accuracies, options.output / "averaging_cnn.png")
    numbers = {
        "backend": keras.backend.backend(),
        "final_rates": FINAL_RATES,
        "kinds": KINDS,
        "accuracies": accuracies.tolist(),
    }
    path = options.output / "averaging.json"
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"Pictures and figures: {options.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
