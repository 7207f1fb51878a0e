"""
Title: Large batches with SGD, LARS, LAMB and TVLARS
Date created: 2026/11/21
Last modified: 2026/11/21
Description: Does TVLARS, without warm-up, train well at large batches?
Accelerator: NONE
"""

"""
A small convolutional network with batch norm learns Fashion-MNIST for a fixed
number of epochs. The larger the batch, the fewer the updates: 24 an epoch at
batch 512, 3 at batch 4096. Four arms share weights and batches, seed by seed
(a seed fixes the initial weights and the order of the rows):

- SGD with momentum; its learning rate falls along a cosine;
- LARS and LAMB with a linear warm-up, then a cosine;
- TVLARS without warm-up: its rate starts high and falls along a sigmoid.

    KERAS_BACKEND=jax python guides/large_batch.py --data path/to/fashion_mnist

The folder holds `fashion_mnist.npz`; the environment variable FASHION_MNIST
can name it instead of `--data`. The learning rates were picked on rows held
out of the training split; `--tune` picks them again. The test split is used
once for each reported run, at its end.

What the result does not say:

- One small network, few epochs, no augmentation and no weight decay: it
  speaks of optimization in few updates, hardly of generalization.
- The shape of each schedule was set once, by custom, and not tuned. The
  learning rates between the smallest and the largest batch are interpolated.
- Every interval is over seeds: the training rows and test rows are the same.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import argparse
import json
import pathlib
import textwrap
import time

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.table import Table

import keras_stab
from keras_stab.diagnostics.report.statistics import paired_difference

try:
    from guide_tools import FILE
    from guide_tools import Shuffled
    from guide_tools import Start
    from guide_tools import at_least
    from guide_tools import epochs_bar
    from guide_tools import plot_band
    from guide_tools import prepared
    from guide_tools import read_fashion_mnist
    from guide_tools import spread
    from guide_tools import tidy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise SystemExit(
        f"The guide needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo]"'
    ) from error

"""
## The four arms

LARS and TVLARS take learning rates far above 1. Variables that they do not
adapt (biases, scales) need smaller ones: `excluded_lr_scale`. The factor of
TVLARS is set from the number of updates of the run, as are the warm-ups.
"""

CLASSES = 10
ARMS = ("SGD", "LARS", "LAMB", "TVLARS")
MOMENTUM = 0.9
WARMUP = 0.2  # of the run
HOLD, DECAY = 0.1, 0.6  # of the run: TVLARS near its plateau, then falling
EXCLUDED_LR_SCALE = 0.01

# What `--tune` tries: equally many rates, equally far apart, for each arm.
TUNING_SEEDS = (100, 101)
GRIDS = {
    "SGD": (0.05, 0.15, 0.45, 1.35),
    "LARS": (6.0, 18.0, 54.0, 162.0),
    "LAMB": (0.015, 0.045, 0.135, 0.405),
    "TVLARS": (6.0, 18.0, 54.0, 162.0),
}
# What it picked, by batch size (on TensorFlow).
RATES = {
    "SGD": {512: 0.45, 4096: 0.45},
    "LARS": {512: 54.0, 4096: 54.0},
    "LAMB": {512: 0.045, 4096: 0.135},
    "TVLARS": {512: 54.0, 4096: 54.0},
}


def picked_rate(arm, batch):
    """The tuned rate in two digits; between batch sizes, by a power law."""
    sizes, rates = np.log(list(RATES[arm])), np.log(list(RATES[arm].values()))
    return float(f"{np.exp(np.interp(np.log(batch), sizes, rates)):.2g}")


def make_schedule(arm, rate, steps):
    """The learning rate of an arm; that of TVLARS is constant."""
    if arm == "TVLARS":
        return rate
    warmup = 0 if arm == "SGD" else round(WARMUP * steps)
    return keras_stab.WarmupCosine(rate, warmup, steps)


def make_optimizer(arm, rate, steps):
    schedule = make_schedule(arm, rate, steps)
    layerwise = {
        "momentum": MOMENTUM,
        "excluded_lr_scale": EXCLUDED_LR_SCALE,
        "track_trust_ratios": True,
    }
    if arm == "SGD":
        return keras.optimizers.SGD(schedule, momentum=MOMENTUM)
    if arm == "LARS":
        return keras_stab.LARS(schedule, **layerwise)
    if arm == "LAMB":
        return keras_stab.LAMB(
            schedule, weight_decay=0.0, track_trust_ratios=True
        )
    return keras_stab.TVLARS.from_steps(
        hold_steps=HOLD * steps,
        decay_steps=DECAY * steps,
        learning_rate=schedule,
        **layerwise,
    )


def rate_over_time(arm, steps):
    """What the schedule multiplies the rate by at each update of a run."""
    updates = np.arange(steps + 1)
    if arm == "TVLARS":
        return make_optimizer(arm, 1.0, steps).phi(updates)
    schedule = make_schedule(arm, 1.0, steps)
    return keras.ops.convert_to_numpy(schedule(updates))


def make_network():
    """Three convolutions with batch norm; light enough for a CPU."""
    stack = [keras.Input((28, 28, 1))]
    for place, (filters, size, stride) in enumerate(
        ((16, 4, 4), (32, 3, 2), (64, 3, 2)), start=1
    ):
        stack += [
            layers.Conv2D(
                filters,
                size,
                strides=stride,
                padding="same",
                use_bias=False,
                name=f"conv{place}",
            ),
            # Few updates: the moving statistics must follow quickly.
            layers.BatchNormalization(momentum=0.8, name=f"norm{place}"),
            layers.ReLU(),
        ]
    stack += [
        layers.GlobalAveragePooling2D(),
        layers.Dense(CLASSES, name="dense"),
    ]
    return keras.Sequential(stack)


"""
## The data
"""

EVALUATION_BATCH = 2000


def load_data(folder, rows, held_out):
    """Pictures to train on, to choose by, and to report on.

    Args:
        folder: Path with `fashion_mnist.npz`, or `None`.
        rows: How many of the training split to train on.
        held_out: How many others of it to choose by.

    Returns:
        Dict from "train", "held_out" and "test" to arrays `(x, y)`.
    """
    if folder is None:
        raise SystemExit(
            f"Where is Fashion-MNIST? Give the folder that holds {FILE}, by "
            "--data or by the environment variable FASHION_MNIST."
        )
    arrays = read_fashion_mnist(folder)
    count = len(arrays["x_train"])
    if rows + held_out > count:
        raise SystemExit(
            f"{pathlib.Path(folder) / FILE} has {count} training rows. "
            f"Received: --rows {rows} and --held-out {held_out}, together more."
        )
    order = np.random.default_rng(0).permutation(count)
    chosen, others = order[:rows], order[rows : rows + held_out]
    pictures = arrays["x_train"]
    classes = arrays["y_train"]
    return {
        "train": prepared(pictures[chosen], classes[chosen]),
        "held_out": prepared(pictures[others], classes[others]),
        "test": prepared(arrays["x_test"], arrays["y_test"]),
    }


"""
## Training

One model serves all seeds of an arm at a batch size, because a new one would
be compiled again: weights and optimizer go back to the start.
"""


class Watch(keras.callbacks.Callback):
    """Keeps the trust ratios at the end of each epoch; moves the bar on."""

    def __init__(self, advance):
        super().__init__()
        self.advance = advance
        self.ratios = {}

    def on_epoch_end(self, epoch, logs=None):
        self.advance()
        optimizer = self.model.optimizer
        if not getattr(optimizer, "track_trust_ratios", False):
            return
        for path, ratio in optimizer.trust_ratios().items():
            layer = path.split("/")[-2]
            self.ratios.setdefault(layer, []).append(float(ratio))


class Trainer:
    """An arm at a batch size, to be trained from the start many times."""

    def __init__(self, arm, batch, rate, data, epochs):
        self.settings = {"arm": arm, "batch": batch, "rate": rate}
        self.data, self.epochs = data, epochs
        self.updates = epochs * (len(data["train"][0]) // batch)
        self.model = make_network()
        self.model.compile(
            optimizer=make_optimizer(arm, rate, self.updates),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._start = Start(self.model, make_network)

    def run(self, seed, advance=lambda: None):
        """Trains once.

        Returns:
            Dict of the figures of one run, accuracies in percent.
        """
        self._start.rewind(seed)
        watch = Watch(advance)
        start = time.perf_counter()
        history = self.model.fit(
            Shuffled(*self.data["train"], self.settings["batch"], seed),
            shuffle=False,
            epochs=self.epochs,
            validation_data=self.data["held_out"],
            validation_batch_size=EVALUATION_BATCH,
            callbacks=[watch],
            verbose=0,
        ).history
        seconds = time.perf_counter() - start
        return {
            **self.settings,
            "updates": self.updates,
            "seed": seed,
            "seconds": seconds,
            "loss": history["loss"],
            "held_out_accuracy": [100.0 * a for a in history["val_accuracy"]],
            "trust_ratios": watch.ratios,
        }

    def test_accuracy(self):
        """Of the model as it is, in percent."""
        return (
            100.0
            * self.model.evaluate(
                *self.data["test"],
                batch_size=EVALUATION_BATCH,
                verbose=0,
                return_dict=True,
            )["accuracy"]
        )


def run_all(data, batches, seeds, epochs, console):
    """Trains every arm at every batch size on every seed.

    Returns:
        Dict from `(batch, arm)` to its list of runs, in the order of seeds.
    """
    cells = [(batch, arm) for batch in batches for arm in ARMS]
    runs = {cell: [] for cell in cells}
    with epochs_bar(console) as progress:
        task = progress.add_task("", total=len(cells) * seeds * epochs)
        for batch, arm in cells:
            progress.update(task, description=f"batch {batch}, {arm}")
            trainer = Trainer(arm, batch, picked_rate(arm, batch), data, epochs)
            for seed in range(seeds):
                run = trainer.run(seed, lambda: progress.advance(task))
                run["test_accuracy"] = trainer.test_accuracy()
                runs[batch, arm].append(run)
        progress.update(task, description="Trained")
    return runs


"""
## Picking the learning rates

The same number of rates for each arm, at the smallest and the largest batch,
on seeds that are not reported; the last accuracy on held-out rows decides.
"""


def search(data, batches, epochs, console):
    """Held-out accuracy of every rate.

    Returns:
        Dict from `(batch, arm)` to a dict from rate to accuracy in percent.
    """
    ends = sorted({min(batches), max(batches)})
    scores = {(batch, arm): {} for batch in ends for arm in ARMS}
    count = sum(len(GRIDS[arm]) for _, arm in scores)
    with epochs_bar(console) as progress:
        task = progress.add_task("", total=count * len(TUNING_SEEDS) * epochs)
        for (batch, arm), tried in scores.items():
            for rate in GRIDS[arm]:
                progress.update(
                    task, description=f"batch {batch}, {arm}, {rate:g}"
                )
                trainer = Trainer(arm, batch, rate, data, epochs)
                reached = [
                    score(trainer.run(seed, lambda: progress.advance(task)))
                    for seed in TUNING_SEEDS
                ]
                tried[rate] = float(np.mean(reached))
        progress.update(task, description="Searched")
    return scores


def score(run):
    return 0.0 if failed(run) else run["held_out_accuracy"][-1]


def best_rates(scores):
    """From `search` to the form of `RATES`, and the cells at an edge."""
    rates, edges = {arm: {} for arm in ARMS}, []
    for (batch, arm), tried in scores.items():
        rates[arm][batch] = max(tried, key=tried.get)
        if rates[arm][batch] in (min(tried), max(tried)):
            edges.append((batch, arm))
    return rates, edges


def tune(data, batches, epochs, console):
    scores = search(data, batches, epochs, console)
    rates, edges = best_rates(scores)
    table = Table(
        title=f"Held-out accuracy in %, mean of {len(TUNING_SEEDS)} seeds; "
        f"learning rate: accuracy ({keras.backend.backend()})"
    )
    table.add_column("Batch", justify="right")
    table.add_column("Arm")
    for column in range(max(map(len, GRIDS.values()))):
        table.add_column("", justify="right")
    for (batch, arm), tried in scores.items():
        table.add_row(
            str(batch),
            arm,
            *(
                f"{'[bold]' * (rate == rates[arm][batch])}{rate:g}: {value:.1f}"
                for rate, value in tried.items()
            ),
        )
    console.print(table)
    for batch, arm in edges:
        console.print(f"At an edge of its grid: {arm}, batch {batch}.")
    console.print(f"RATES = {rates}", highlight=False, soft_wrap=True)


"""
## What the numbers say
"""


def failed(run):
    """Whether a run ended with a loss no better than guessing."""
    return not run["loss"][-1] < np.log(CLASSES)


def accuracies(runs):
    return np.array([run["test_accuracy"] for run in runs])


def compare(runs, level=0.95):
    """TVLARS against each other arm at each batch size, seed by seed.

    Args:
        runs: Dict from `(batch, arm)` to runs, each with "test_accuracy".
        level: Float, the confidence that all intervals hold together
            (Bonferroni).

    Returns:
        List of dicts with `batch`, `rival` and, in points, `mean`, `low` and
        `high` of TVLARS minus the rival.
    """
    rivals = [cell for cell in runs if cell[1] != "TVLARS"]
    single = 1.0 - (1.0 - level) / len(rivals)
    results = []
    for batch, rival in rivals:
        mean, low, high = paired_difference(
            accuracies(runs[batch, rival]),
            accuracies(runs[batch, "TVLARS"]),
            single,
        )
        results.append(
            {
                "batch": batch,
                "rival": rival,
                "mean": mean,
                "low": low,
                "high": high,
            }
        )
    return results


def verdict(comparisons):
    """The comparisons in plain words."""
    better = [c for c in comparisons if c["low"] > 0.0]
    worse = [c for c in comparisons if c["high"] < 0.0]
    rest = len(comparisons) - len(better) - len(worse)
    if not better and not worse:
        return (
            "Nothing separates TVLARS from the other arms: each of the "
            f"{rest} intervals of the paired difference contains 0."
        )
    parts = [
        f"{word} {_named(chosen)}"
        for word, chosen in (("better", better), ("worse", worse))
        if chosen
    ]
    decided = {c["rival"] for c in better + worse}
    equal = [arm for arm in ARMS[:-1] if arm not in decided]
    if equal:
        parts.append(f"not to be told from {_listed(equal)}")
    return (
        f"TVLARS is {_listed(parts)}. In {rest} of {len(comparisons)} "
        "comparisons the interval contains 0."
    )


def _named(comparisons):
    where = {}
    for c in comparisons:
        place = f"{c['batch']} ({c['mean']:+.1f})"
        where.setdefault(c["rival"], []).append(place)
    return _listed(
        [
            f"than {rival} at batch {_listed(places)}"
            for rival, places in where.items()
        ]
    )


def _listed(words):
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def make_table(runs, comparisons):
    """The results as a rich table."""
    seeds = len(next(iter(runs.values())))
    table = Table(
        title=f"Test accuracy in %, mean ± standard deviation of {seeds} seeds "
        f"({keras.backend.backend()})",
        caption="LARS and LAMB with warm-up. Steps: updates of a run. TVLARS "
        "minus: paired by seed; all intervals together hold with 95 % "
        "confidence. Failed: runs whose training loss ends no better than "
        "guessing (they count in the mean). Time: median of a run, in seconds.",
        caption_justify="left",
    )
    table.add_column("Batch\n(steps)", justify="right")
    table.add_column("Arm")
    for header in ("Rate", "Accuracy", "TVLARS\nminus", "Failed", "Time"):
        table.add_column(header, justify="right")
    found = {(c["batch"], c["rival"]): c for c in comparisons}
    for (batch, arm), own in runs.items():
        values = accuracies(own)
        pair = found.get((batch, arm))
        places = {ARMS[0]: str(batch), ARMS[1]: f"({own[0]['updates']})"}
        table.add_row(
            places.get(arm, ""),
            arm,
            f"{own[0]['rate']:g}",
            spread(values),
            f"{pair['mean']:+.1f} ± {pair['high'] - pair['mean']:.1f}"
            if pair
            else "",
            str(sum(map(failed, own))),
            f"{np.median([run['seconds'] for run in own]):.1f}",
            end_section=arm == ARMS[-1],
        )
    return table


"""
## The picture
"""

COLORS = dict(zip(ARMS, ("0.45", "#4477aa", "#228833", "#cc5511")))
LAYER_COLORS = ("#332288", "#44aa99", "#ddaa33", "#aa4499")


def draw(runs, sentence, path):
    """Writes the picture: schedules, ratios and ends; below, the runs."""
    batches = sorted({batch for batch, _ in runs})
    figure = Figure(figsize=(12.0, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        textwrap.fill(sentence, 105), fontsize=12, fontweight="bold"
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    left, middle, right = top.subplots(1, 3)
    _draw_schedules(left)
    _draw_ratios(middle, runs, batches[-1])
    _draw_ends(right, runs, batches)
    row = bottom.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    _draw_curves(row, runs, batches)
    seeds = len(runs[batches[0], ARMS[0]])
    bottom.supxlabel(
        f"Small CNN with batch norm on Fashion-MNIST, {seeds} seeds; "
        f"mean, band or bar: 1 standard deviation; Keras {keras.version()} on "
        f"{keras.backend.backend()}",
        fontsize=9,
        color="0.4",
    )
    figure.savefig(path, dpi=130)


def _draw_schedules(axes):
    steps = 1000
    for arm, label in (
        ("SGD", "SGD: cosine"),
        ("LARS", "LARS, LAMB: warm-up, cosine"),
        ("TVLARS", "TVLARS: φ(t)"),
    ):
        axes.plot(
            np.linspace(0.0, 100.0, steps + 1),
            rate_over_time(arm, steps),
            color=COLORS[arm],
            linewidth=2,
            label=label,
        )
    axes.set_title("What multiplies the learning rate")
    axes.set_xlabel("Updates done (%)")
    axes.set_ylim(top=1.3)  # room for the legend
    axes.set_yticks(np.linspace(0.0, 1.0, 6))
    axes.legend(frameon=False, loc="upper right")
    tidy(axes)


def _draw_ratios(axes, runs, batch):
    styles = {"TVLARS": "-", "LARS": "--"}
    names = list(runs[batch, "TVLARS"][0]["trust_ratios"])
    for arm, style in styles.items():
        for name, color in zip(names, LAYER_COLORS):
            ratios = np.array(
                [run["trust_ratios"][name] for run in runs[batch, arm]]
            )
            epochs = np.arange(1, ratios.shape[1] + 1)
            low, high = ratios.min(axis=0), ratios.max(axis=0)
            axes.fill_between(
                epochs, low, high, color=color, alpha=0.12, linewidth=0
            )
            axes.plot(epochs, np.median(ratios, axis=0), style, color=color)
    axes.set_yscale("log")
    axes.set_title(f"Trust ratios per layer at batch {batch}")
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("Ratio, without φ (band: all seeds)")
    handles = [
        Line2D([], [], color=color, label=name)
        for name, color in zip(names, LAYER_COLORS)
    ] + [
        Line2D([], [], color="0.3", linestyle=style, label=arm)
        for arm, style in styles.items()
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8.5, ncols=2)
    tidy(axes)


def _draw_ends(axes, runs, batches):
    for place, arm in enumerate(ARMS):
        # Beside each other, so that no bar hides another.
        x = np.arange(len(batches)) + 0.16 * (place - 1.5)
        values = np.array([accuracies(runs[batch, arm]) for batch in batches])
        axes.errorbar(
            x,
            values.mean(axis=1),
            values.std(axis=1, ddof=1),
            color=COLORS[arm],
            marker="o",
            markersize=5,
            linewidth=1,
            elinewidth=2,
            label=arm,
        )
        axes.scatter(
            np.repeat(x + 0.05, values.shape[1]),
            values.ravel(),
            color=COLORS[arm],
            s=6,
            alpha=0.6,
        )
    axes.set_xticks(range(len(batches)), batches)
    axes.set_title("Test accuracy (small dots: seeds)")
    axes.set_xlabel("Batch size")
    axes.set_ylabel("Accuracy (%)")
    axes.legend(frameon=False)
    tidy(axes)


def _draw_curves(row, runs, batches):
    for axes, batch in zip(row, batches):
        for arm in ARMS:
            curves = np.array(
                [run["held_out_accuracy"] for run in runs[batch, arm]]
            )
            plot_band(axes, curves, COLORS[arm], linewidth=1.7, label=arm)
        updates = runs[batch, ARMS[0]][0]["updates"]
        axes.set_title(f"Batch {batch}: {updates} updates")
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    row[0].set_ylabel("Accuracy on held-out rows (%)")
    row[-1].legend(frameon=False, loc="lower right")


"""
## All together
"""


def parse(argv):
    parser = argparse.ArgumentParser(
        description="SGD, LARS, LAMB and TVLARS at large batches."
    )
    add = parser.add_argument
    add(
        "--data",
        default=os.environ.get("FASHION_MNIST"),
        metavar="FOLDER",
        help=f"holds {FILE} (default: the environment variable FASHION_MNIST)",
    )
    add(
        "--batches",
        type=at_least(1),
        nargs="+",
        default=[512, 1024, 2048, 4096],
        metavar="B",
        help="batch sizes (default: 512 1024 2048 4096)",
    )
    for name, least, default, text in (
        ("seeds", 2, 5, "train on the seeds 0 to N - 1"),
        ("epochs", 1, 10, "epochs of a run"),
        ("rows", 1, 12288, "training rows"),
        ("held-out", 1, 4000, "further training rows, to choose rates by"),
    ):
        add(
            f"--{name}",
            type=at_least(least),
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    add("--tune", action="store_true", help="only search the learning rates")
    add(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("large_batch.png"),
        metavar="PNG",
        help="where the picture goes (default: %(default)s)",
    )
    add(
        "--json",
        type=pathlib.Path,
        metavar="PATH",
        help="also write all numbers there",
    )
    options = parser.parse_args(argv)
    options.batches = sorted(set(options.batches))
    if options.batches[-1] > options.rows:
        parser.error(
            f"a batch of {options.batches[-1]} needs as many --rows. "
            f"Received: {options.rows}"
        )
    return options


def main(argv=None):
    options = parse(argv)
    console = Console()
    data = load_data(options.data, options.rows, options.held_out)
    if options.tune:
        tune(data, options.batches, options.epochs, console)
        return
    runs = run_all(
        data, options.batches, options.seeds, options.epochs, console
    )
    comparisons = compare(runs)
    sentence = verdict(comparisons)
    console.print(make_table(runs, comparisons))
    console.print(sentence, style="bold", highlight=False)
    draw(runs, sentence, options.output)
    console.print(f"Picture: {options.output}", highlight=False, soft_wrap=True)
    if options.json:
        numbers = {
            "backend": keras.backend.backend(),
            "keras": keras.version(),
            "keras_stab": keras_stab.__version__,
            "comparisons": comparisons,
            "verdict": sentence,
            "runs": [run for own in runs.values() for run in own],
        }
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
