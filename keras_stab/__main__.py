"""`python -m keras_stab`: what is installed here, and does it work?"""

import argparse
import inspect
import platform
import sys

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_stab
from keras_stab.backend import devices

# A method that cannot be made without arguments gets some here.
ARGUMENTS = {"TVLARS": {"decay_rate": 0.1, "delay": 1}}


def methods():
    """The public optimizers, as a dict from name to class."""
    return {
        name: thing
        for name, thing in sorted(vars(keras_stab).items())
        if inspect.isclass(thing)
        and issubclass(thing, keras.optimizers.Optimizer)
    }


def first_line(thing):
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def versions():
    """Pairs of a name and a version or a description."""
    backend = devices.backend_name()
    return [
        ("keras_stab", keras_stab.__version__),
        ("Keras", keras.version()),
        ("backend", f"{backend} {sys.modules[backend].__version__}"),
        ("devices", ", ".join(device_names())),
        ("Python", platform.python_version()),
        ("NumPy", np.__version__),
    ]


def device_names():
    """What the backend computes on."""
    try:
        return keras.distribution.list_devices()
    except (AttributeError, NotImplementedError, ValueError):
        # No list on PyTorch: a new tensor at least shows where it is.
        return [str(keras.ops.zeros(1).device)]


def check(method):
    """Trains a tiny model for two steps.

    Returns:
        `None`, or a sentence on what is wrong.
    """
    try:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(4, "tanh"),
                keras.layers.Dense(1),
            ]
        )
        model.compile(
            optimizer=method(**ARGUMENTS.get(method.__name__, {})), loss="mse"
        )
        before = model.get_weights()
        x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
        model.fit(x, x.sum(axis=1), batch_size=8, verbose=0)
        after = model.get_weights()
    except Exception as error:
        # Whatever it is: this is the place to report it.
        return f"{type(error).__name__}: {error}"
    if not all(np.all(np.isfinite(weight)) for weight in after):
        return "the weights are not finite after a step"
    if all(np.array_equal(a, b) for a, b in zip(before, after)):
        return "the weights did not move"
    return None


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m keras_stab",
        description="Prints versions, devices and methods, and checks each "
        "method with a tiny step. The exit status is 0 if all of them pass.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="METHOD",
        choices=list(methods()),
        help="check these methods (default: all)",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="list the methods and train nothing",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, or 1 if a method failed."""
    options = parse(argv)
    console = Console()
    for name, value in versions():
        console.print(f"[bold]{name:<11}[/bold]{value}", highlight=False)
    table = Table(box=None, pad_edge=False, title_justify="left")
    for title in ("Method", "", "Step"):
        table.add_column(title)
    failures = {}
    with console.status("") as status:
        for name, method in methods().items():
            outcome = ""
            if not options.no_check and name in (options.only or methods()):
                status.update(f"Checking {name}")
                failures[name] = check(method)
                outcome = "failed" if failures[name] else "ok"
            table.add_row(name, first_line(method), outcome)
    console.print()
    console.print(table)
    failures = {name: why for name, why in failures.items() if why}
    for name, why in failures.items():
        console.print(f"\n{name} failed: {why}", markup=False, soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
