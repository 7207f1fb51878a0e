"""
Title: Did it help?
Date created: 2026/11/21
Last modified: 2026/11/21
Description: An honest answer to whether a change made training better.
Accelerator: NONE
"""

"""
Two runs of the same network with two seeds differ, often by more than two
methods do. Whether a method helped is therefore a question about many runs.
`keras_stab.stability_report` trains both arms on the same seeds, compares them
seed by seed and says in words what the scores allow to be said, which can be
that they do not allow anything.

Here it is asked twice about AdamW and 2000 pictures of Fashion-MNIST: does SAM
around it help? And does a learning rate that is 2 % larger? The latter cannot
matter much; a method of comparison that finds it better or worse would not be
worth much.

    KERAS_BACKEND=jax python guides/did_it_help.py --data FOLDER

The folder must hold `fashion_mnist.npz` with the arrays `x_train`, `y_train`,
`x_test` and `y_test`. All settings are default ones, nothing was tuned, so the
answer is about this network and these settings only.

On JAX, with twelve seeds, it was "cannot tell" twice: SAM(AdamW) minus AdamW
was +0.35 points (98.8 % interval -0.26 to 0.97), the larger rate minus AdamW
+0.13 (-0.26 to 0.51). To find half a point takes 26 seeds for SAM. The standard
deviation of AdamW was 0.7 points with both seeds new in each run, 0.9 with new
weights alone and 0.9 with a new order alone: these three cannot be told apart.
If runs only disagreed picture by picture it would have been 0.5, and a new test
set of 2000 pictures moves an accuracy by 0.9.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import json
import pathlib
import tempfile

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_stab

try:
    from guide_tools import Shuffled
    from guide_tools import at_least
    from guide_tools import prepared
    from guide_tools import read_fashion_mnist
    from guide_tools import tidy
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise SystemExit(
        f"The guide needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo]"'
    ) from error

TRAIN_ROWS = 2000
TEST_ROWS = 2000
RATE = 1e-3
BLUE, ORANGE, GRAY = "#4477aa", "#cc5511", "0.6"


@functools.cache
def load(folder, train_rows):
    """Some pictures of both splits, the same for every run."""
    arrays = read_fashion_mnist(folder)
    random = np.random.default_rng(0)
    parts = []
    for split, rows in (("train", train_rows), ("test", TEST_ROWS)):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        chosen = random.permutation(len(x))[:rows]
        parts += prepared(x[chosen], y[chosen])
    return parts


"""
## Fourteen lines

A function that trains once and returns a score, and the arms by name: that is
all that the report asks for. Without the options of this guide it takes the
eleven lines of the function, one for the arms, the call, and a `print`.

The function is handed an optimizer and two seeds. The first weights follow
`seeds.initialisation`, which is set already; the order of the rows follows
`seeds.order`. With the predictions on the test set, and what is right, the
report knows more than with the score alone.
"""


def build_and_fit(optimizer, seeds, folder, rows, epochs):
    x, y, x_test, y_test = load(folder, rows)
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(64, "relu"))
    model.add(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    model.fit(Shuffled(x, y, 50, seeds.order), epochs=epochs, verbose=0)
    scores = model.predict(x_test, batch_size=TEST_ROWS, verbose=0)
    accuracy = 100 * np.mean(scores.argmax(axis=-1) == y_test)
    return {"accuracy": accuracy, "predictions": scores, "targets": y_test}


def adamw(factor=1.0):
    return keras.optimizers.AdamW(factor * RATE)


def sam():
    return keras_stab.SAM(adamw())


ARMS = {
    "AdamW": adamw,
    "SAM(AdamW)": sam,
    "AdamW, rate + 2 %": functools.partial(adamw, 1.02),
}


def compare(options, folder):
    return keras_stab.stability_report(
        run_of(options),
        ARMS,
        seeds=options.seeds,
        folder=folder / "arms",
        metric="accuracy",
        unit="points",
        relevant_difference=0.5,
        processes=options.processes,
    )


def run_of(options):
    return functools.partial(
        build_and_fit,
        folder=options.data,
        rows=options.rows,
        epochs=options.epochs,
    )


"""
## Where the deviation comes from

The same arm again, with one of the two seeds held: how much do runs differ that
start from the same weights, or see the rows in the same order?
"""


def deviations(options, folder, report):
    """Standard deviation of AdamW's accuracy, by what varies."""
    found = {"both": report.arms["AdamW"]}
    for vary in ("initialisation", "order"):
        part = keras_stab.stability_report(
            run_of(options),
            {"AdamW": adamw},
            seeds=options.seeds,
            folder=folder / vary,
            metric="accuracy",
            vary=vary,
            processes=options.processes,
            pictures=False,
        )
        found[vary] = part.arms["AdamW"]
    return found


def deviations_table(found):
    table = Table(
        title="What varies between runs of AdamW, and by how much",
        caption="Deviation: of the accuracy in points, with its 95 % "
        "interval. Flip floor: what it would be if runs only disagreed "
        "picture by picture. Agreement: share of test pictures on which two "
        "runs agree.",
        caption_justify="left",
    )
    for title in ("Varies", "Deviation", "Flip floor", "Agreement"):
        table.add_column(
            title, justify="left" if title == "Varies" else "right"
        )
    for name, own in found.items():
        deviation, low, high = own.deviation
        table.add_row(
            name,
            f"{deviation:.2f} ({low:.2f} to {high:.2f})",
            f"{own.flip_floor:.2f}",
            f"{100 * own.agreement:.1f} %",
        )
    return table


"""
## What "cannot tell" means, and how many seeds it takes

The interval of the difference shrinks as seeds are added. As long as it
contains 0, the scores agree with a method that helps, with one that harms and
with one that does nothing: more seeds, or nothing to be said. It does not mean
that the arms are the same. That can be shown, too: with `relevant_difference`
the report says so when the whole interval lies within it.

Stopping at the seed at which the interval first leaves 0 would be cheating:
with enough looks, chance does it. Decide on the number of seeds first, by
`keras_stab.seeds_needed`.
"""


def growing(report, arm):
    """Comparisons of an arm with AdamW on the first 2, 3, ... seeds."""
    level = report.comparisons[arm].level
    a, b = report.scores("AdamW"), report.scores(arm)
    return [
        keras_stab.compare_scores(
            a[:count], b[:count], level=level, questions=("mean",)
        )
        for count in range(2, len(a) + 1)
    ]


def seeds_table(report):
    table = Table(title="Seeds that find a difference four times in five")
    table.add_column("Points")
    for arm in report.comparisons:
        table.add_column(f"{arm} against AdamW", justify="right")
    for points in (2.0, 1.0, 0.5, 0.25):
        counts = [
            keras_stab.seeds_needed(
                points, own.deviation_of_differences, level=own.level
            )
            for own in report.comparisons.values()
        ]
        table.add_row(f"{points:g}", *map(str, counts))
    return table


"""
## The picture
"""


def draw(report, found, path):
    """Intervals by the number of seeds, and deviations by what varies."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    *parts, right = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    for axes, arm in zip(parts, report.comparisons):
        _draw_growing(axes, growing(report, arm), arm)
    parts[0].set_ylabel("Points of accuracy")
    _draw_deviations(right, report, found)
    figure.savefig(path, dpi=150)


def _draw_growing(axes, comparisons, arm):
    counts = np.array([own.pairs for own in comparisons])
    value, low, high = np.array([own.difference for own in comparisons]).T
    axes.axhline(0.0, color="0.4", linewidth=1, linestyle="--")
    axes.fill_between(counts, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(counts, value, color=BLUE, marker="o", markersize=4)
    # The interval of two seeds is so wide that nothing else would be seen.
    shown = high[2:] - low[2:] if len(high) > 2 else high - low
    axes.set_ylim(-1.1 * shown.max(), 1.1 * shown.max())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Seeds")
    axes.set_title(f"{arm} minus AdamW\nmean and interval", fontsize=11)
    tidy(axes)


def _draw_deviations(axes, report, found):
    places = np.arange(len(found))
    intervals = [own.deviation for own in found.values()]
    axes.errorbar(
        places,
        [own.value for own in intervals],
        yerr=[
            [own.value - own.low for own in intervals],
            [own.high - own.value for own in intervals],
        ],
        color=ORANGE,
        marker="o",
        linestyle="none",
        capsize=4,
        label="deviation",
    )
    axes.scatter(
        places + 0.12,
        [own.flip_floor for own in found.values()],
        color=GRAY,
        marker="D",
        label="flip floor",
    )
    axes.axhline(
        report.arms["AdamW"].binomial_floor,
        color="0.4",
        linestyle=":",
        label="test-set floor",
    )
    axes.set_ylim(bottom=0.0)
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set_xticks(places, list(found))
    axes.set_xlabel("What varies between runs")
    axes.set_title("Deviation of AdamW\n(points, 95 % interval)", fontsize=11)
    axes.legend(loc="best", frameon=False)
    tidy(axes)


"""
## All together
"""


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Does SAM help AdamW? Does a 2 % larger learning rate?"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER",
        help="folder that holds fashion_mnist.npz",
    )
    for name, least, default, words in (
        ("--seeds", 3, 12, "seeds of each arm"),
        ("--rows", 50, TRAIN_ROWS, "pictures to train on"),
        ("--epochs", 1, 10, "epochs of a run"),
        ("--processes", 1, 1, "runs side by side"),
    ):
        parser.add_argument(
            name,
            type=at_least(least),
            default=default,
            metavar="N",
            help=f"{words} (default: {default})",
        )
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="FOLDER",
        help="keep runs and reports there; what is there already is not "
        "trained again",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("did_it_help.png"),
        metavar="PNG",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="PATH", help="write numbers there"
    )
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.report or pathlib.Path(temporary)
        report = compare(options, folder)
        found = deviations(options, folder, report)
    print(report)
    console.print()
    console.print(deviations_table(found))
    console.print(seeds_table(report))
    draw(report, found, options.output)
    console.print(f"Picture: {options.output}", highlight=False, soft_wrap=True)
    if options.json:
        numbers = {
            **report.as_dict(),
            "varies": {
                name: {
                    "deviation": own.deviation,
                    "flip_floor": own.flip_floor,
                    "agreement": own.agreement,
                }
                for name, own in found.items()
            },
        }
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
