"""
Title: Flat minima with SAM and IRE
Date created: 2026/11/21
Last modified: 2026/11/21
Description: Accuracy and sharpness of a CNN after SGD, SAM, IRE and SAM-IRE.
Accelerator: NONE
"""

"""
A small convolutional network learns Fashion-MNIST from a few thousand
pictures, long enough to know them by heart. Four optimizers end in minima of
different shape, from the same weights and batches:

- SGD with momentum;
- SAM, which takes the gradient where the loss near by is highest;
- IRE around SGD, which moves faster along flat weights;
- IRE around SAM.

    KERAS_BACKEND=jax python guides/flat_minima.py --data fashion_mnist

The folder holds `fashion_mnist.npz` with `x_train`, `y_train`, `x_test` and
`y_test`. Few pictures, few seeds, settings that were not tuned arm by arm:
take it as a look at the shape of minima, not as a race.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import argparse
import json
import pathlib

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import keras_stab

try:
    from guide_tools import prepared
    from guide_tools import read_fashion_mnist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(
        f"The guide needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo]"'
    ) from error

"""
## The data
"""

TEST_ROWS = 5000
BATCH = 128


def load_data(folder, rows):
    """Some rows to train on, and test rows; pictures of mean 0 or so."""
    arrays = read_fashion_mnist(folder)
    x, y = arrays["x_train"], arrays["y_train"]
    chosen = np.random.default_rng(0).permutation(len(x))[:rows]
    return (
        prepared(x[chosen], y[chosen]),
        prepared(arrays["x_test"][:TEST_ROWS], arrays["y_test"][:TEST_ROWS]),
    )


def make_model(shape):
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


"""
## The arms
"""

RHO = 0.1


def make_optimizer(arm, steps):
    base = keras.optimizers.SGD(
        keras_stab.WarmupCosine(0.05, steps // 10, steps), momentum=0.9
    )
    if "SAM" in arm:
        base = keras_stab.SAM(base, rho=RHO)
    if "IRE" in arm:
        base = keras_stab.IRE(
            base, flat_fraction=0.8, boost=1.0, start_step=steps // 5
        )
    return base


ARMS = ("SGD", "SAM", "IRE(SGD)", "IRE(SAM)")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def train(arm, seed, data, epochs, on_epoch):
    """A trained model."""
    (x, y), _ = data
    keras.utils.set_random_seed(seed)
    model = make_model(x.shape[1:])
    steps = max(10, epochs * -(-len(x) // BATCH))
    model.compile(make_optimizer(arm, steps), LOSS, metrics=["accuracy"])
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        rows = order.permutation(len(x))
        model.fit(x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0)
        on_epoch()
    return model


"""
## The shape of a minimum

Along random directions in which every weight counts by its own size, so that
models with large and small weights compare; and straight up the gradient.
"""

DISTANCES = np.linspace(-0.3, 0.3, 13)


def loss_around(model, x, y, directions):
    """Mean loss at relative distances along random directions."""
    weights = model.get_weights()
    random = np.random.default_rng(1)
    losses = []
    for _ in range(directions):
        direction = [np.abs(w) * random.normal(size=w.shape) for w in weights]
        found = keras_stab.loss_landscape(
            model,
            (x, y),
            directions=[direction],
            distance=DISTANCES[-1],
            points=len(DISTANCES),
            batch_size=500,
            verbose=0,
        )
        losses.append(found.losses)
    return np.mean(losses, axis=0)


def gap_uphill(model, x, y, radius=0.05):
    """How much the loss rises one radius up its gradient: SAM's own measure."""
    still = keras_stab.SAM(keras.optimizers.SGD(0.0), rho=radius)
    other = make_model(x.shape[1:])
    other.set_weights(model.get_weights())
    other.compile(still, LOSS)
    other.train_on_batch(x, y)
    return still.diagnostics()["sharpness_gap"]


def examine(model, data, directions):
    (x, y), (x_test, y_test) = data
    loss, train_accuracy = model.evaluate(x, y, batch_size=500, verbose=0)
    _, accuracy = model.evaluate(x_test, y_test, batch_size=500, verbose=0)
    return {
        "train_loss": float(loss),
        "train_accuracy": 100.0 * float(train_accuracy),
        "test_accuracy": 100.0 * float(accuracy),
        "gap": float(gap_uphill(model, x[:1000], y[:1000])),
        "around": loss_around(model, x[:1000], y[:1000], directions).tolist(),
    }


"""
## What comes out
"""

COLORS = dict(zip(ARMS, ("#4477aa", "#cc5511", "#228833", "#aa3377")))


def make_table(results, seeds):
    table = Table(title=f"Mean over {seeds} seed(s) ± standard deviation")
    for header in ("Arm", "Test %", "Train %", "Train loss", "Gap uphill"):
        table.add_column(header, justify="left" if header == "Arm" else "right")
    for arm, own in results.items():
        cells = []
        for key, digits in (
            ("test_accuracy", 2),
            ("train_accuracy", 2),
            ("train_loss", 4),
            ("gap", 4),
        ):
            values = np.array([run[key] for run in own])
            cells.append(
                f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"
            )
        table.add_row(arm, *cells)
    return table


def draw(results, path):
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    for arm, own in results.items():
        mean = np.mean([run["around"] for run in own], axis=0)
        left.plot(DISTANCES, mean, color=COLORS[arm], label=arm)
        gaps = [run["gap"] for run in own]
        accuracies = [run["test_accuracy"] for run in own]
        right.scatter(gaps, accuracies, color=COLORS[arm], label=arm)
    left.set_yscale("log")
    left.set_xlabel("Distance, relative to the size of each weight")
    left.set_ylabel("Training loss")
    left.set_title("The loss around each minimum (random directions)")
    left.legend(frameon=False)
    right.legend(frameon=False)
    right.set_xscale("log")
    right.set_xlabel("Rise of the loss, 0.05 up the gradient")
    right.set_ylabel("Test accuracy (%)")
    right.set_title("Sharpness and accuracy, a dot a seed")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Flat minima of a CNN.")
    add = parser.add_argument
    add(
        "--data",
        type=pathlib.Path,
        required=True,
        help="folder with fashion_mnist.npz",
    )
    add("--rows", type=int, default=3000, help="to train on (default: 3000)")
    add("--epochs", type=int, default=20, help="default: 20")
    add("--seeds", type=int, default=3, help="default: 3")
    add("--directions", type=int, default=5, help="default: 5")
    add("--output", type=pathlib.Path, default=pathlib.Path("flat_minima.png"))
    add("--json", type=pathlib.Path, help="also write all numbers there")
    options = parser.parse_args(argv)
    if min(options.rows, options.epochs, options.seeds, options.directions) < 1:
        parser.error("every number must be at least 1")
    data = load_data(options.data, options.rows)
    console = Console()
    results = {arm: [] for arm in ARMS}
    with Progress(console=console) as progress:
        total = len(ARMS) * options.seeds * options.epochs
        task = progress.add_task("", total=total)
        for seed in range(options.seeds):
            for arm in ARMS:
                progress.update(task, description=f"seed {seed}, {arm}")
                model = train(
                    arm,
                    seed,
                    data,
                    options.epochs,
                    lambda: progress.advance(task),
                )
                results[arm].append(examine(model, data, options.directions))
    console.print(make_table(results, options.seeds))
    draw(results, options.output)
    console.print(f"Picture: {options.output}", soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
