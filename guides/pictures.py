"""
Title: A picture of every method
Date created: 2026/11/21
Last modified: 2026/11/21
Description: Trajectories on surfaces of two weights, drawn from real runs.
Accelerator: NONE
"""

"""
Two weights, a surface, noise in the gradient: enough to see what a method
does, not whether it helps on your problem. Every line is a run of the optimizer
itself, thin lines are single seeds and thick ones their mean. The pictures are
those of the method cards.

    python guides/pictures.py --output guides/images
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # eager: nothing to compile

import argparse
import pathlib

import keras
import numpy as np
from keras import ops

import keras_stab

try:
    from guide_tools import at_least
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from rich.progress import track
except ImportError as error:
    raise SystemExit(
        f"The guide needs {error.name}. Install it with\n"
        '  pip install "keras-stab[demo]"'
    ) from error

"""
## Runs

A model whose weights are the two coordinates. A row of data is what noise adds
to the gradient, so a batch of rows is a noisy gradient, and methods that look
at groups of rows or at shifted weights see just what they see elsewhere.
"""


class Surface(keras.Model):
    """Loss `f(u, v)` plus, for each row of data, a random linear term."""

    def __init__(self, function, start):
        super().__init__()
        self.function = function
        # Matrices: what has one dimension is left alone by LARS and LAMB.
        for name, value in zip("uv", start):
            weight = self.add_weight(shape=(1, 1), name=name)
            weight.assign([[value]])
            setattr(self, name, weight)

    def call(self, inputs):
        return inputs

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        x = ops.convert_to_tensor(x)
        u, v = ops.squeeze(self.u), ops.squeeze(self.v)
        # A third column tells two kinds of rows apart.
        slope = ops.mean(x[:, :2], axis=0)
        return ops.mean(self.function(u, v, x)) + slope[0] * u + slope[1] * v

    def point(self):
        return [float(ops.squeeze(w)) for w in (self.u, self.v)]


def paths(function, start, make_optimizer, steps, seeds, noise, extra=None):
    """Array `(seeds, steps + 1, 2)` of the points of a method."""
    result = []
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        random = np.random.default_rng(seed)
        model = Surface(function, start)
        optimizer = make_optimizer()
        model.compile(optimizer=optimizer)
        points = [model.point()]
        for _ in range(steps):
            x = noise * random.normal(size=(8, 3))
            x[:, 2] = np.arange(8) % 2
            model.train_on_batch(x.astype("float32"))
            points.append(extra(optimizer, model) if extra else model.point())
        result.append(points)
    return np.array(result)


def played(make_optimizer, steps, seeds, noise):
    """The game `x y`: x descends, y ascends."""
    result = []
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        x, y = keras.Variable(1.0), keras.Variable(0.6)
        optimizer, points = make_optimizer(), [(1.0, 0.6)]
        for _ in range(steps):
            a, b = noise * random.normal(size=2)
            optimizer.apply([y + float(a), -(x + float(b))], [x, y])
            points.append((float(x), float(y)))
        result.append(points)
    return np.array(result)


"""
## Drawing
"""

COLORS = ("#4477aa", "#cc5511", "#228833", "#aa3377", "#ccaa22")


def contours(axes, function, limits):
    (left, right), (low, high) = limits
    u, v = np.meshgrid(
        np.linspace(left, right, 120), np.linspace(low, high, 120)
    )
    rows = ops.zeros((1, 3))
    z = ops.convert_to_numpy(
        ops.vectorized_map(
            lambda p: ops.mean(function(p[0], p[1], rows)),
            ops.convert_to_tensor(
                np.stack([u.ravel(), v.ravel()], 1).astype("float32")
            ),
        )
    ).reshape(u.shape)
    axes.contour(u, v, z, levels=14, colors="0.85", linewidths=0.8)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def trajectories(axes, runs):
    for color, (label, points) in zip(COLORS, runs.items()):
        for own in points:
            axes.plot(*own.T, color=color, alpha=0.25, linewidth=0.8)
        mean = points.mean(axis=0)
        axes.plot(*mean.T, color=color, linewidth=2, label=label)
        axes.scatter(*mean[-1], color=color, s=36, zorder=3)
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def new_axes(title, of_x="first weight", of_y="second weight"):
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(of_x)
    axes.set_ylabel(of_y)
    return figure, axes


def on_surface(title, function, limits, start, arms, steps, seeds, noise):
    figure, axes = new_axes(title)
    contours(axes, function, limits)
    runs = {
        label: paths(function, start, make, steps, seeds, noise)
        for label, make in arms.items()
    }
    trajectories(axes, runs)
    return figure


"""
## The pictures
"""

sgd = keras.optimizers.SGD


def two_minds(u, v, x):
    """Rows pull to (-1, 0), softly, or to (1, 0), hard: every other one."""
    hard = x[:, 2]
    soft = (u + 1.0) ** 2 + v**2
    steep = 6.0 * ((u - 1.0) ** 2 + (v - 0.6) ** 2)
    return (1.0 - hard) * soft + hard * steep


def grain(seeds):
    figure, axes = new_axes("Two kinds of rows, which pull to two minima")
    runs = {
        label: paths(two_minds, (-0.6, 1.6), make, 60, seeds, 0.5)
        for label, make in {
            "SGD": lambda: sgd(0.02),
            "GRAIN(SGD), K = 2": lambda: keras_stab.GRAIN(
                sgd(0.02), groups=2, engine="microbatch"
            ),
        }.items()
    }
    for place, marker, label in (
        ((-1, 0), "x", "minimum of half of the rows (soft)"),
        ((1, 0.6), "*", "of the other half (hard)"),
    ):
        axes.scatter(*place, marker=marker, color="0.3", s=80, label=label)
    trajectories(axes, runs)
    return figure


def valleys(u, v, x):
    """A narrow valley on the way to a wide one."""
    narrow = ops.exp(-((u - 0.2) ** 2) / 0.02 - (v**2) / 0.5)
    wide = ops.exp(-((u + 1.6) ** 2 + v**2) / 1.6)
    return 0.05 * (u**2 + v**2) - 1.0 * narrow - 1.2 * wide


def sam(seeds):
    return on_surface(
        "A narrow valley beside a wide one",
        valleys,
        ((-2.6, 1.2), (-1.2, 1.2)),
        (0.75, 0.8),
        {
            "SGD": lambda: sgd(0.05),
            "SAM(SGD), rho 0.5": lambda: keras_stab.SAM(sgd(0.05), rho=0.5),
        },
        120,
        seeds,
        0.2,
    )


def ravine(u, v, x):
    return 0.01 * (u - 2.0) ** 2 + 1.0 * v**2


def ire(seeds):
    return on_surface(
        "A ravine: IRE moves farther along the flat weight",
        ravine,
        ((-2.2, 2.4), (-1.1, 1.1)),
        (-2.0, 0.9),
        {
            "SGD": lambda: sgd(0.5),
            "IRE(SGD), boost 4": lambda: keras_stab.IRE(
                sgd(0.5),
                flat_fraction=0.5,
                boost=4.0,
                update_every=1,
                curvature="gradient",
                curvature_momentum=0.95,
            ),
        },
        60,
        seeds,
        0.05,
    )


def scales(u, v, x):
    """Two layers, one with gradients a thousand times those of the other."""
    return 0.5 * (10.0 * (u - 0.2) ** 2 + 0.01 * (v - 0.2) ** 2)


def lars(seeds):
    return on_surface(
        "Gradients of two sizes: LARS steps by the size of the weights",
        scales,
        ((0.0, 1.2), (0.0, 1.2)),
        (1.0, 1.0),
        {
            "SGD": lambda: sgd(0.05),
            "LARS": lambda: keras_stab.LARS(
                0.5, momentum=0.0, trust_coefficient=0.1
            ),
        },
        30,
        seeds,
        0.005,
    )


def sizes(u, v, x):
    return 0.5 * ((u - 1.0) ** 2 + (v - 0.01) ** 2)


def lamb(seeds):
    figure, axes = new_axes(
        "Weights of two sizes: Adam steps by the same, LAMB by a share",
        "update",
        "weight over its first value",
    )
    runs = {
        label: paths(sizes, (4.0, 0.04), make, 40, seeds, 0.005)
        for label, make in {
            "Adam": lambda: keras.optimizers.Adam(0.05),
            "LAMB": lambda: keras_stab.LAMB(0.05, weight_decay=0.0),
        }.items()
    }
    for color, (label, points) in zip(COLORS, runs.items()):
        for i, style in ((0, "-"), (1, "--")):
            start = points[:, :1, i]
            relative = np.abs(points[:, :, i] / start)
            axes.plot(
                relative.mean(0),
                style,
                color=color,
                label=(f"{label}, {('large', 'small')[i]} weight"),
            )
            axes.fill_between(
                range(relative.shape[1]),
                relative.min(0),
                relative.max(0),
                color=color,
                alpha=0.15,
                linewidth=0,
            )
    axes.axhline(
        0.25, color="0.6", linewidth=0.8, linestyle=":", label="both minima"
    )
    axes.set_ylim(0, 1.3)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def tvlars(seeds):
    del seeds  # nothing is random here
    figure, axes = new_axes(
        "What multiplies the layer-wise rate", "update", "factor"
    )
    steps = np.arange(1000)
    for color, (hold, decay) in zip(COLORS, ((100, 600), (300, 300))):
        optimizer = keras_stab.TVLARS.from_steps(hold, decay)
        axes.plot(
            steps,
            [float(optimizer.phi(t)) for t in steps],
            color=color,
            label=f"TVLARS, hold {hold}, decay {decay}",
        )
    schedule = keras_stab.WarmupPolynomial(1.0, 100, 1000)
    axes.plot(
        steps,
        [float(schedule(t)) for t in steps],
        color="0.5",
        linestyle="--",
        label="LARS with warm-up and polynomial",
    )
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def bowl(u, v, x):
    return 0.5 * (0.4 * u**2 + 1.6 * v**2)


def weight_averaging(seeds):
    def average(optimizer, model):
        if not optimizer.averaged:
            return model.point()
        return [float(ops.squeeze(a)) for a in optimizer.averages]

    figure, axes = new_axes("SGD with a large step, and the mean of its tail")
    contours(axes, bowl, ((-1.5, 3.0), (-1.6, 1.6)))

    def make():
        return keras_stab.AveragedSGD(0.5, start_step=15)

    runs = {
        "last weights": paths(bowl, (2.7, 1.2), make, 60, seeds, 1.5),
        "their average": paths(bowl, (2.7, 1.2), make, 60, seeds, 1.5, average),
    }
    trajectories(axes, runs)
    return figure


def schedule_free(seeds):
    figure, axes = new_axes("What the model holds: SGD and ScheduleFree")
    contours(axes, bowl, ((-1.0, 3.0), (-1.0, 1.6)))
    runs = {
        "SGD": paths(bowl, (2.7, 1.2), lambda: sgd(0.5), 60, seeds, 1.0),
        "ScheduleFree.sgd": paths(
            bowl,
            (2.7, 1.2),
            lambda: keras_stab.ScheduleFree.sgd(1.0),
            60,
            seeds,
            1.0,
        ),
    }
    trajectories(axes, runs)
    return figure


def game(title, arms, steps, seeds):
    figure, axes = new_axes(title, "x descends on x y", "y ascends on it")
    runs = {
        label: played(make, steps, seeds, 0.05) for label, make in arms.items()
    }
    axes.scatter([0], [0], marker="*", color="0.3", s=90, label="solution")
    trajectories(axes, runs)
    axes.set_xlim(-2.2, 2.2)
    axes.set_ylim(-1.8, 1.8)
    return figure


def lookahead(seeds):
    return game(
        "The game x y: after five steps, half of the way back",
        {
            "SGD": lambda: sgd(0.15),
            "Lookahead(SGD)": lambda: keras_stab.Lookahead(sgd(0.15)),
        },
        60,
        seeds,
    )


def games(seeds):
    return game(
        "The game x y, 60 gradients for each method",
        {
            "SGD": lambda: sgd(0.15),
            "ExtraGradient": lambda: keras_stab.ExtraGradient(sgd(0.3)),
            "OptimisticGradient": lambda: keras_stab.OptimisticGradient(
                sgd(0.3)
            ),
            "RAPP": lambda: keras_stab.RAPP(0.7, inner_steps=3),
        },
        60,
        seeds,
    )


PICTURES = (
    grain,
    sam,
    ire,
    lars,
    lamb,
    tvlars,
    weight_averaging,
    schedule_free,
    lookahead,
    games,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draws every method.")
    add = parser.add_argument
    add("--output", type=pathlib.Path, default=pathlib.Path("."))
    add("--seeds", type=at_least(1), default=5, help="default: 5")
    add("--only", help="name of a picture")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [p for p in PICTURES if options.only in (None, p.__name__)]
    if not chosen:
        names = ", ".join(p.__name__ for p in PICTURES)
        parser.error(f"--only must be one of {names}")
    for picture in track(chosen, description="Pictures"):
        path = options.output / f"method_{picture.__name__}.png"
        picture(options.seeds).savefig(path, dpi=110)


if __name__ == "__main__":
    main()
