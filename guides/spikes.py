"""
Title: Broken batches
Date created: 2026/11/30
Last modified: 2026/11/30
Description: A few broken batches ruin a run. What saves it, and what does not?
Accelerator: NONE
"""

"""
A pipeline of data breaks now and then: one batch in fifty comes as it is in the
file, with pixels up to 255 that nobody has scaled.
Its gradient is hundreds of times as long as others. What is left of a small
network that learns Fashion-MNIST by SGD with momentum? These arms have the same
seeds, the same batches and the same broken ones:

- SGD, with nothing against it;
- SGD with a tenth of the learning rate;
- SGD with the gradient clipped to norm 1;
- SGD with `keras_stab.RecoverFromSpikes`, which leaves out the updates of such
  batches;
- the same with `action="rollback"`, which makes them and then goes back;
- SGD on data that are not broken: what there is to be saved.

And one more pair asks for the opposite: on data that are not broken, does the
callback do harm, by leaving out what was only a hard batch?

    KERAS_BACKEND=torch python guides/spikes.py --data FOLDER

The folder must hold `fashion_mnist.npz`. The learning rate is a customary one
and the limit of the norm too; nothing was tuned.

On PyTorch with five seeds SGD ended at 15.5 % accuracy, with a tenth of the
rate at 44.0, with the callback at 70.3 (skip) and 69.3 (rollback), clipped at
81.4, and at 80.2 without broken batches. The callback is better than SGD alone
and than the lower rate; it cannot be told from clipping, whose mean is higher.
In two of the five seeds a batch broke before the window was full: it passed,
and cost the run 16 to 33 points. On data that are not broken the callback left
out one batch in 2000, and the accuracy as it was.

It is one small network and one kind of damage: batches that are broken a
little, or most of the time, are another matter.
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

import keras_stab

try:
    from guide_tools import Shuffled
    from guide_tools import at_least
    from guide_tools import prepared
    from guide_tools import read_fashion_mnist
    from guide_tools import tidy
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(
        f"The guide needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo]"'
    ) from error

TRAIN_ROWS, TEST_ROWS, BATCH = 4000, 2000, 50
RATE = 0.05
BROKEN = 1 / 50
WINDOW = 40  # steps, in which nothing finite is a spike yet
COLORS = ("#4477aa", "0.3", "0.6", "#ccaa11", "#66ccee", "#cc5511", "#aa3377")

"""
## Data that break

What is broken is drawn with the seed, for all arms alike.
"""


@functools.cache
def load(folder, train_rows):
    arrays = read_fashion_mnist(folder)
    random = np.random.default_rng(0)
    parts = []
    for split, rows in (("train", train_rows), ("test", TEST_ROWS)):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        chosen = random.permutation(len(x))[:rows]
        parts += prepared(x[chosen], y[chosen])
    return parts


class Breaking(Shuffled):
    """Batches some of which nobody has scaled."""

    def __init__(self, x, y, batch, seed):
        self.fate = np.random.default_rng([seed, 2])
        self.epoch = 0
        super().__init__(x, y, batch, seed)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (255.0 * (0.353 * x + 0.286) if self.broken[index] else x), y

    def on_epoch_end(self):
        super().on_epoch_end()
        self.broken = self.fate.random(len(self)) < BROKEN
        # `fit` calls this once before it begins.
        self.broken &= self.epoch > 0
        self.epoch += 1


"""
## The arms

`keras_stab.stability_report` hands an optimizer to the function that trains;
its name says what else belongs to the arm.
"""


def sgd(name, factor=1.0, **arguments):
    return keras.optimizers.SGD(
        factor * RATE, momentum=0.9, name=name, **arguments
    )


# The others are compared with the first one.
ARMS = {
    "skip": functools.partial(sgd, "skip"),
    "SGD": functools.partial(sgd, "plain"),
    "rate / 10": functools.partial(sgd, "low", 0.1),
    "clipped": functools.partial(sgd, "clipped", global_clipnorm=1.0),
    "rollback": functools.partial(sgd, "rollback"),
    "not broken": functools.partial(sgd, "whole"),
    "not broken, skip": functools.partial(sgd, "whole_skip"),
}
CALLBACKS = {
    "skip": functools.partial(keras_stab.RecoverFromSpikes, window=WINDOW),
    "rollback": functools.partial(
        keras_stab.RecoverFromSpikes,
        action="rollback",
        window=WINDOW,
        snapshot_every=20,
        check_every=1,
    ),
}
CALLBACKS["whole_skip"] = CALLBACKS["skip"]


def build_and_fit(optimizer, seeds, folder, rows, epochs):
    x, y, x_test, y_test = load(folder, rows)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    kind = Shuffled if optimizer.name.startswith("whole") else Breaking
    data = kind(x, y, BATCH, seeds.order)
    recover = CALLBACKS.get(optimizer.name)
    callbacks = [recover()] if recover else []
    history = model.fit(data, epochs=epochs, verbose=0, callbacks=callbacks)
    scores = model.predict(x_test, batch_size=TEST_ROWS, verbose=0)
    return {
        "accuracy": 100 * np.mean(scores.argmax(axis=-1) == y_test),
        "spikes": sum(history.history.get("spikes/count", [0])),
    }


def compare(options, folder):
    return keras_stab.stability_report(
        functools.partial(
            build_and_fit,
            folder=options.data,
            rows=options.rows,
            epochs=options.epochs,
        ),
        ARMS,
        seeds=options.seeds,
        folder=folder,
        metric="accuracy",
        unit="points",
        processes=options.processes,
        pictures=False,
    )


"""
## The picture
"""


def draw(report, path):
    """The accuracy of every run, arm by arm."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (arm, color) in enumerate(zip(ARMS, COLORS)):
        scores = report.scores(arm)
        axes.scatter(np.full(len(scores), place), scores, color=color, s=18)
        axes.hlines(np.mean(scores), place - 0.25, place + 0.25, color=color)
    axes.set_xticks(range(len(ARMS)), list(ARMS))
    axes.set_ylabel("Test accuracy (%)")
    tidy(axes)
    figure.savefig(path, dpi=150)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="What saves a run from broken batches?"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER",
        help="folder that holds fashion_mnist.npz",
    )
    for name, least, default, words in (
        ("--seeds", 3, 5, "seeds of each arm"),
        ("--rows", 50, TRAIN_ROWS, "pictures to train on"),
        ("--epochs", 1, 5, "epochs of a run"),
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
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("spikes.png"),
        metavar="PNG",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="PATH", help="write numbers there"
    )
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = compare(options, pathlib.Path(folder))
    print(report)
    draw(report, options.output)
    console = Console()
    console.print(f"Picture: {options.output}", highlight=False, soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
