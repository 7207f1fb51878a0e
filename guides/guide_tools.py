"""What several guides use: data, runs, progress bars, axes."""

import argparse
import pathlib

import keras
import numpy as np
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

FILE = "fashion_mnist.npz"
SHAPES = {
    "x_train": (28, 28),
    "y_train": (),
    "x_test": (28, 28),
    "y_test": (),
}


def read_fashion_mnist(folder):
    """The arrays of `fashion_mnist.npz` by name, as they are in the file."""
    path = pathlib.Path(folder) / FILE
    wanted = ", ".join(
        f"{name} [rows{''.join(f', {n}' for n in shape)}]"
        for name, shape in SHAPES.items()
    )
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}. Expected: Fashion-MNIST as one file of "
            f"NumPy with the arrays {wanted}; pixels from 0 to 255, classes "
            "from 0 to 9."
        )
    with np.load(path) as file:
        arrays = {name: file[name] for name in SHAPES if name in file}
    for name, shape in SHAPES.items():
        if name not in arrays or arrays[name].shape[1:] != shape:
            raise SystemExit(f"{path} must hold the arrays {wanted}.")
    return arrays


def prepared(pictures, classes):
    """Pictures of mean 0 or so, with a channel, and their classes."""
    x = (pictures[..., None].astype("float32") / 255.0 - 0.286) / 0.353
    return x, classes.astype("int32")


class Shuffled(keras.utils.PyDataset):
    """Batches in an order that depends on seed and epoch alone.

    `fit` could shuffle the arrays itself, but Keras 3.15 on TensorFlow then
    repeats one order in all epochs once the seed is set.

    Args:
        x, y: Arrays.
        batch: Int, rows in a batch.
        seed: Int.
        keep_rest: Whether a shorter last batch is kept.
    """

    def __init__(self, x, y, batch, seed, keep_rest=False):
        super().__init__()
        self.x, self.y, self.batch = x, y, batch
        self.rows = len(x) if keep_rest else len(x) - len(x) % batch
        # Another stream than what the guide itself draws with the seed.
        self.random = np.random.default_rng([seed, 1])
        self.on_epoch_end()

    def __len__(self):
        return -(-self.rows // self.batch)

    def __getitem__(self, index):
        rows = self.order[index * self.batch : (index + 1) * self.batch]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.x))


class Start:
    """Where the runs of one compiled model begin.

    Args:
        model: A compiled model.
        make_network: Makes another one like it, with new weights.
    """

    def __init__(self, model, make_network):
        self.model, self.make_network = model, make_network
        model.optimizer.build(model.trainable_variables)
        self._state = [
            np.array(keras.ops.convert_to_numpy(v))
            for v in model.optimizer.variables
        ]

    def rewind(self, seed):
        """First weights of the seed, and an optimizer that has done nothing."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make_network().get_weights())
        for variable, value in zip(self.model.optimizer.variables, self._state):
            variable.assign(value)


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
