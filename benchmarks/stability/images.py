"""Pictures of two data sets, and the small networks that learn them."""

import io
import zipfile
from typing import ClassVar

import keras
import numpy as np
from keras import layers

import keras_stab
from stability.pretrained_features import cached
from stability.task import FewRows

CLASSES = 10
PARTS = ("pool", "held_out", "test")


def split(train, test, sizes):
    """Parts of a data set, drawn without repeats and always the same.

    Args:
        train: Int, rows of the training split.
        test: Int, rows of the test split.
        sizes: Ints: rows to draw runs from, held out, and to test on.

    Returns:
        Dict from the part to the numbers of its rows.
    """
    pool, held_out, tested = sizes
    if pool + held_out > train or tested > test:
        raise ValueError(
            f"There are {train} training rows and {test} test rows. "
            f"Received: sizes={sizes}"
        )
    random = np.random.default_rng(0)
    order = random.permutation(train)
    return {
        "pool": order[:pool],
        "held_out": order[pool : pool + held_out],
        "test": random.permutation(test)[:tested],
    }


def read_fashion_mnist(data, sizes):
    """Dict of the parts: bytes [rows, 28, 28, 1] and classes."""
    path = data / "fashion_mnist" / "fashion_mnist.npz"
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}. Expected: Fashion-MNIST as one file "
            "with the arrays x_train, y_train, x_test and y_test."
        )
    with np.load(path) as file:
        arrays = dict(file)
    rows = split(len(arrays["y_train"]), len(arrays["y_test"]), sizes)
    parts = {}
    for part in PARTS:
        kind = "test" if part == "test" else "train"
        pictures = arrays[f"x_{kind}"][rows[part]][..., None]
        classes = arrays[f"y_{kind}"][rows[part]]
        parts[part] = pictures, classes.astype("int32")
    return parts


def decode_cifar10(data, sizes):
    """Dict with `<part>_x`, bytes [rows, 32, 32, 3], and `<part>_y`."""
    from PIL import Image

    path = data / "cifar10_jpeg" / "cifar10_jpeg.zip"
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}. Expected: CIFAR-10 as a zip of "
            "train/<class>/<number>.jpg and test/<class>/<number>.jpg."
        )
    arrays = {}
    with zipfile.ZipFile(path) as file:
        names = {
            kind: sorted(
                name
                for name in file.namelist()
                if name.startswith(f"{kind}/") and name.endswith(".jpg")
            )
            for kind in ("train", "test")
        }
        found = sorted({name.split("/")[1] for name in names["test"]})
        rows = split(len(names["train"]), len(names["test"]), sizes)
        for part in PARTS:
            own = names["test" if part == "test" else "train"]
            own = [own[row] for row in rows[part]]
            arrays[f"{part}_x"] = np.stack(
                [np.asarray(Image.open(io.BytesIO(file.read(n)))) for n in own]
            )
            arrays[f"{part}_y"] = np.array(
                [found.index(name.split("/")[1]) for name in own], "int32"
            )
    return arrays


def prepare_cifar10(task, data, cache):
    """Sets the parts of a task, from the data or without any.

    Args:
        task: With `sizes` as in `split`.
        data, cache: As in `Task.prepare`.
    """
    if data is None:
        parts = made_up((32, 32, 3), task.sizes)
    else:
        sizes = "_".join(str(size) for size in task.sizes)
        arrays = cached(
            cache / f"cifar10_{sizes}.npz",
            lambda: decode_cifar10(data, task.sizes),
        )
        parts = {
            part: (arrays[f"{part}_x"], arrays[f"{part}_y"]) for part in PARTS
        }
    for part, arrays in parts.items():
        setattr(task, part, arrays)


def made_up(shape, sizes, seed=0):
    """Parts without any data: one faint pattern for each class, and noise."""
    random = np.random.default_rng(seed)
    patterns = random.normal(size=(CLASSES, *shape))
    parts = {}
    for part, size in zip(PARTS, sizes):
        classes = random.integers(CLASSES, size=size).astype("int32")
        noise = random.normal(size=(size, *shape))
        pictures = 128 + 50 * (0.3 * patterns[classes] + noise)
        parts[part] = np.clip(pictures, 0, 255).astype("uint8"), classes
    return parts


def byte_input(shape):
    """First layers: bytes become numbers of mean 0 and deviation 1 or so."""
    # Bytes take a quarter of the room; the rows of each run are copied.
    return [
        keras.Input(shape, dtype="uint8"),
        layers.Rescaling(1 / 76.5, offset=-4 / 3),
    ]


def make_network(shape, widths):
    """Convolutions with batch norm; light enough for one core.

    The first takes patches of 4 x 4 pixels, the others halve the sides.
    """
    stack = byte_input(shape)
    for place, width in enumerate(widths):
        stack += [
            layers.Conv2D(
                width,
                3 if place else 4,
                strides=2 if place else 4,
                padding="same",
                use_bias=False,
            ),
            # Few updates: the moving statistics must follow quickly.
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(CLASSES)]
    return keras.Sequential(stack)


class FromScratch(FewRows):
    """A network with batch norm, trained from scratch on few pictures.

    Some arms end at weights that no step has seen. So the statistics of the
    batch norms are computed anew before a score, from the rows of the run and
    for every arm.

    Attributes:
        shape: Of a picture.
        widths: Of the network's convolutions.
    """

    classes = CLASSES
    widths: ClassVar[tuple[int, ...]] = (16, 32, 64)
    shape: ClassVar[tuple[int, ...]]

    def make_model(self):
        return make_network(self.shape, self.widths)

    def train(self, model, seeds, arm, callbacks=None):
        super().train(model, seeds, arm, callbacks)
        rows, _ = self.draw(seeds.initialisation)
        self._trained_on = self.pool[0][rows]

    def score(self, model, part):
        keras_stab.reestimate_batch_norm(
            model, self._trained_on, batch_size=500, verbose=0
        )
        return super().score(model, part)
