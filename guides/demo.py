"""
Title: Training on wrong labels, with and without GRAIN
Date created: 2026/11/21
Last modified: 2026/11/21
Description: Does GRAIN around AdamW help when some labels are wrong?
Accelerator: NONE
"""

"""
A small classifier learns handwritten digits from a few hundred rows, 30 % of
which carry a wrong label. Plain AdamW in time learns the wrong labels by
heart. GRAIN hands the same AdamW a direction that conflicts with no group of
rows.

Both arms run on the same seeds: a seed fixes the split, the flipped labels,
the initial weights and the order of the rows. What counts is therefore the
difference seed by seed, at the end of training.

    KERAS_BACKEND=jax python guides/demo.py --seeds 8 --epochs 30 --groups 16

What the result does not say:

- AdamW is as good as GRAIN before it memorises: stopped at the right epoch
  (column "Best"; to find it takes rows with clean labels), or with a quarter
  of the learning rate (seen on the seeds 100 to 105, see below).
- 4 groups, the default of GRAIN, and 8 change little here. It takes 16 groups
  of 4 rows, fewer rows per group than GRAIN advises in general.
- The interval speaks of this data set: the splits of all seeds are drawn
  from the same 1797 rows.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# Matrices this small gain nothing from more threads, and waiting for each
# other made torch up to ten times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import json
import pathlib
import tempfile
import textwrap
import time

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_stab

try:
    from guide_tools import Shuffled
    from guide_tools import Start
    from guide_tools import at_least
    from guide_tools import plot_band
    from guide_tools import spread
    from guide_tools import tidy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise SystemExit(
        f"The demo needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo]"'
    ) from error

"""
## The two arms

Settings were tried on the seeds 100 to 105 only, which are not reported. Both
arms share them all. The learning rate and the number of epochs are such that
plain AdamW has time to memorise; that is the case the demo is about.
"""

TRAIN_ROWS = 384
WRONG_SHARE = 0.3
CLASSES = 10
WIDTH = 128
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
ARMS = ("AdamW", "GRAIN(AdamW)")


def make_optimizer(arm, groups):
    optimizer = keras.optimizers.AdamW(learning_rate=LEARNING_RATE)
    if arm == "GRAIN(AdamW)":
        optimizer = keras_stab.GRAIN(optimizer, groups=groups)
    return optimizer


def make_network():
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(WIDTH, activation="relu"),
            keras.layers.Dense(WIDTH, activation="relu"),
            keras.layers.Dense(CLASSES),
        ]
    )


"""
## The data
"""


def load_data(seed):
    """Digits with wrong labels to train on, and clean ones to test on.

    Returns:
        Dict of arrays: `x`, `y` and `wrong` (boolean, where `y` was flipped)
        of the training rows, `x_test` and `y_test`.
    """
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype("float32")
    y = y.astype("int32")
    x, x_test, y, y_test = train_test_split(
        x, y, train_size=TRAIN_ROWS, stratify=y, random_state=seed
    )
    random = np.random.default_rng(seed)
    wrong = np.zeros(len(y), dtype=bool)
    count = round(WRONG_SHARE * len(y))
    wrong[random.choice(len(y), count, replace=False)] = True
    # A shift of 1 to 9 never gives the right class back.
    shift = random.integers(1, CLASSES, len(y)).astype("int32")
    y = np.where(wrong, (y + shift) % CLASSES, y)
    return {"x": x, "y": y, "wrong": wrong, "x_test": x_test, "y_test": y_test}


"""
## Training

One model per arm serves all seeds, because a new one would be compiled again.
`Contestant.run` puts weights and optimizer back to the start. Pairing the runs
and comparing them is left to `keras_stab.stability_report`.
"""


class Contestant:
    """A compiled model that can be trained from the start many times."""

    def __init__(self, optimizer):
        self.model = make_network()
        self.model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._start = Start(self.model, make_network)

    def run(self, seeds, epochs):
        """Trains once.

        Returns:
            Dict of the figures of one run, accuracies in percent.
        """
        data = load_data(seeds.order)
        self._start.rewind(seeds.initialisation)
        start = time.perf_counter()
        history = self.model.fit(
            # `fit` itself would repeat one order on TensorFlow: GRAIN would
            # keep the same groups throughout, and both memorise sooner.
            Shuffled(
                data["x"], data["y"], BATCH_SIZE, seeds.order, keep_rest=True
            ),
            shuffle=False,
            epochs=epochs,
            validation_data=(data["x_test"], data["y_test"]),
            validation_batch_size=len(data["y_test"]),
            verbose=0,
        )
        seconds = time.perf_counter() - start
        logits = self.model.predict(data["x"], batch_size=TRAIN_ROWS, verbose=0)
        fitted = np.argmax(logits, axis=-1) == data["y"]
        curve = [100.0 * a for a in history.history["val_accuracy"]]
        return {
            "training_seconds": seconds,
            "test_accuracy": curve[-1],
            "test_accuracy_per_epoch": curve,
            "train_accuracy_on_noisy_labels": 100.0 * float(fitted.mean()),
            "wrong_labels_learned": 100.0 * float(fitted[data["wrong"]].mean()),
        }


def make_trainer(epochs):
    """The function that `stability_report` calls for every run."""
    contestants = {}

    def build_and_fit(optimizer, seeds):
        # A new optimizer of a kind is like the one that is compiled already.
        kind = type(optimizer)
        if kind not in contestants:
            contestants[kind] = Contestant(optimizer)
        return contestants[kind].run(seeds, epochs)

    return build_and_fit


def compare(options, folder):
    """Trains both arms on every seed; returns what can be said."""
    return keras_stab.stability_report(
        make_trainer(options.epochs),
        {
            arm: functools.partial(make_optimizer, arm, options.groups)
            for arm in ARMS
        },
        seeds=options.seeds,
        folder=folder,
        metric="test_accuracy",
        questions=("mean",),
        unit="points",
        settings={"epochs": options.epochs},
        pictures=bool(options.report),
    )


"""
## What the numbers say
"""


def make_table(report, groups):
    """The results as a rich table."""
    table = Table(
        title="Accuracy in %, mean ± standard deviation of "
        f"{len(report.runs[ARMS[0]])} seeds "
        f"({keras.backend.backend()}, K = {groups})",
        caption="End: clean test rows, last epoch. Best: highest point of "
        "the mean curve (its epoch). Training: on the noisy labels. Wrong "
        "learned: flipped rows for which the model repeats the wrong label. "
        "Seconds: median of a run.",
        caption_justify="left",
    )
    table.add_column("Optimizer")
    for header in ("End", "Best", "Training", "Wrong\nlearned", "Seconds"):
        table.add_column(header, justify="right")
    for arm in ARMS:
        mean = report.column(arm, "test_accuracy_per_epoch").mean(axis=0)
        seconds = np.median(report.column(arm, "training_seconds"))
        table.add_row(
            arm,
            spread(report.scores(arm)),
            f"{mean.max():.1f} ({mean.argmax() + 1})",
            spread(report.column(arm, "train_accuracy_on_noisy_labels")),
            spread(report.column(arm, "wrong_labels_learned")),
            f"{seconds:.1f}",
            end_section=arm == ARMS[-1],
        )
    difference, low, high = report.comparisons[ARMS[1]].difference
    table.add_row("Difference", f"{difference:+.1f}")
    table.add_row("95 % interval", f"{low:.1f} to {high:.1f}")
    return table


"""
## The picture
"""

COLORS = {"AdamW": "#4477aa", "GRAIN(AdamW)": "#cc5511"}


def draw(report, groups, path):
    """Writes the picture: curves on the left, pairs on the right."""
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(
        1, 2, width_ratios=(1.7, 1), gridspec_kw={"wspace": 0.06}
    )
    figure.suptitle(
        textwrap.fill(report.verdict, 72), fontsize=13, fontweight="bold"
    )
    _draw_curves(left, report)
    _draw_pairs(right, report)
    figure.supxlabel(
        f"{TRAIN_ROWS} digits, {100 * WRONG_SHARE:.0f} % of the labels wrong; "
        f"MLP, AdamW {LEARNING_RATE:g}, batch {BATCH_SIZE}, K = {groups}; "
        f"{len(report.runs[ARMS[0]])} seeds; Keras {keras.version()} on "
        f"{keras.backend.backend()}",
        fontsize=8.5,
        color="0.4",
    )
    figure.savefig(path, dpi=150)


def _draw_curves(axes, report):
    for arm in ARMS:
        plot_band(
            axes,
            report.column(arm, "test_accuracy_per_epoch"),
            COLORS[arm],
            linewidth=2,
            label=arm,
        )
    # The first epochs, far below, would flatten what there is to see.
    ends = [report.scores(arm).min() for arm in ARMS]
    axes.set_ylim(bottom=max(0.0, min(ends) - 10.0))
    axes.set_title("During training (mean, band: 1 standard deviation)")
    axes.set_xlabel("Epoch")
    axes.set_ylabel("Accuracy on clean test rows (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", framealpha=0.9, edgecolor="none")
    tidy(axes)


def _draw_pairs(axes, report):
    results = [report.scores(arm) for arm in ARMS]
    for pair in zip(*results):
        axes.plot((0, 1), pair, color="0.65", linewidth=1, zorder=1)
    for place, (arm, values) in enumerate(zip(ARMS, results)):
        axes.scatter(
            np.full(len(values), place), values, color=COLORS[arm], s=28
        )
        # Beside the pairs, outside the lines that connect them.
        side = 1 if place else -1
        axes.plot(
            place + side * 0.14,
            values.mean(),
            marker="<" if place else ">",
            color=COLORS[arm],
            markersize=8,
        )
        axes.annotate(
            f"mean\n{values.mean():.1f}",
            (place + side * 0.2, values.mean()),
            color=COLORS[arm],
            fontweight="bold",
            ha="left" if place else "right",
            va="center",
        )
    axes.set_title("After the last epoch, a line per seed")
    axes.set_xlim(-0.65, 1.65)
    axes.set_xticks((0, 1), ARMS)
    axes.set_ylabel("Accuracy on clean test rows (%)")
    tidy(axes)


"""
## All together
"""


def parse(argv):
    parser = argparse.ArgumentParser(
        description="AdamW with and without GRAIN on wrongly labelled digits."
    )
    parser.add_argument(
        "--seeds",
        type=at_least(2),
        default=8,
        metavar="N",
        help="train on the seeds 0 to N - 1 (default: 8)",
    )
    parser.add_argument(
        "--epochs",
        type=at_least(1),
        default=30,
        metavar="N",
        help="epochs of a run (default: 30)",
    )
    parser.add_argument(
        "--groups",
        type=at_least(1),
        default=16,
        metavar="K",
        help="groups of GRAIN, 1 to 64; 1 is plain AdamW (default: 16)",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("demo.png"),
        metavar="PNG",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="PATH",
        help="also write all numbers there",
    )
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="FOLDER",
        help="keep the runs and the whole report there; what is there already "
        "is not trained again",
    )
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        report = compare(options, options.report or folder)
    console.print(make_table(report, options.groups))
    console.print(report.verdict, style="bold", highlight=False)
    draw(report, options.groups, options.output)
    console.print(f"Picture: {options.output}", highlight=False, soft_wrap=True)
    if options.json:
        interval = report.comparisons[ARMS[1]].difference
        numbers = {
            "backend": keras.backend.backend(),
            "keras": keras.version(),
            "keras_stab": keras_stab.__version__,
            "epochs": options.epochs,
            "groups": options.groups,
            "difference": dict(zip(("mean", "low", "high"), interval)),
            "verdict": report.verdict,
            "runs": [
                {
                    "arm": arm,
                    "seed": run["seeds"][0],
                    **run["metrics"],
                    **run["curves"],
                }
                for arm in ARMS
                for run in report.runs[arm]
            ],
        }
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
