"""
Title: Games of two numbers: who converges, who cycles
Date created: 2026/11/21
Last modified: 2026/11/21
Description: Seven methods on five small games, drawn, and counted by gradients.
Accelerator: NONE
"""

"""
In a game every player descends on a loss of its own, and the players' steps
together need not go downhill on anything. On the simplest game there is,
`min over x, max over y of x y`, simultaneous gradient steps move away from the
solution for ever. This guide runs seven methods on five games with known
solutions and draws what happens.

    KERAS_BACKEND=jax python guides/min_max.py

Two pictures and a table come out. Methods that take two or more gradients for
a step are compared by gradients, which is what costs.

On PyTorch, with the default settings, the distance stayed below 1e-4 after so
many gradients (in the order of the methods below; - means never):

    bilinear           -  180    -    80   57  340  150
    quadratic          -    -    -   654   84    -  130
    polar              - 1617  522  1622 1569 5560 2810
    global forsaken    -  266   80   296  315  960  600
    forsaken           -    -    -     - 8870  705 1200

What the result does not say: these are games of two numbers without noise.
Which method trains a GAN best is another question (see gan.py).
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import keras
import numpy as np
from guide_tools import at_least
from guide_tools import tidy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_stab
from keras_stab import games

"""
## The games

Two constants say how hard a game is: its field F is L-Lipschitz, and
`<F(z), z - z*> >= rho |F(z)|^2`. With `rho >= 0` the field points away from the
solution nowhere; the more negative `rho L` is, the fewer methods come with a
guarantee.

- bilinear: `x y`. The field turns around the solution.
- quadratic: the same, and both players want to leave (`rho L = -1/3`).
- polar: a circle attracts whoever starts outside of it (`rho L = -0.10`).
- global forsaken: gradient steps find a cycle, the solution is the only one
  (`rho L = -0.36`).
- forsaken: as before, but far outside of every theorem (`rho L = -19`).
"""

GAMES = {
    "bilinear": games.bilinear,
    "quadratic": games.quadratic,
    "polar": games.polar,
    "global forsaken": games.global_forsaken,
    "forsaken": games.forsaken,
}

"""
## The methods

Every entry makes an ordinary Keras optimizer for a game; `game.compile` takes
it and `fit` or `train_on_batch` run it. Rates are in units of `1 / L`.

- descent: plain simultaneous gradient steps.
- optimistic: adds the difference of the last two gradients.
- extragradient: looks one step ahead and steps with the gradient found there.
- CEG+: the same with a second step of a quarter of the size.
- RAPP: three steps that all begin at an anchor, then half of the way from the
  anchor to the last.
- Lookahead(descent): 20 steps, then half of the way back.
- Lookahead(CEG+): 5 steps, then half of the way back.
"""


@dataclasses.dataclass
class Method:
    """How to make an optimizer for a rate, and its gradients per step."""

    make: Callable
    rate: float
    gradients: int


def sgd(rate):
    return keras.optimizers.SGD(rate)


METHODS = {
    "descent": Method(sgd, 0.1, 1),
    "optimistic": Method(
        lambda rate: keras_stab.OptimisticGradient(sgd(rate)), 0.3, 1
    ),
    "extragradient": Method(
        lambda rate: keras_stab.CEGPlus(rate, alpha=1.0), 1.0, 2
    ),
    "CEG+": Method(lambda rate: keras_stab.CEGPlus(rate, alpha=0.25), 1.0, 2),
    "RAPP": Method(lambda rate: keras_stab.RAPP(rate, inner_steps=3), 0.9, 3),
    "Lookahead(descent)": Method(
        lambda rate: keras_stab.Lookahead(sgd(rate), sync_period=20), 0.1, 20
    ),
    "Lookahead(CEG+)": Method(
        lambda rate: keras_stab.Lookahead(
            keras_stab.CEGPlus(rate, alpha=0.25), sync_period=5
        ),
        1.0,
        10,
    ),
}

"""
On the game forsaken these rates are too small to leave the cycle. With much
larger ones three methods do; the settings below are known to work from this
start and say nothing about others.
"""

FORSAKEN = {
    "RAPP": Method(
        lambda rate: keras_stab.RAPP(rate, inner_steps=5, relaxation=0.1),
        0.3,
        5,
    ),
    "Lookahead(descent)": Method(
        lambda rate: keras_stab.Lookahead(
            sgd(rate), sync_period=5, slow_step_size=0.1
        ),
        0.3,
        5,
    ),
    "Lookahead(CEG+)": Method(
        lambda rate: keras_stab.Lookahead(
            keras_stab.CEGPlus(rate, alpha=0.5), sync_period=20
        ),
        0.15,
        40,
    ),
}

"""
## One run

Between two steps of a method the game holds look-ahead points, so a point is
noted after whole steps only.
"""

CLOSE = 1e-4
DONE = 1e-7  # where a run may end; float32 gets little closer
FAR = 10.0


@dataclasses.dataclass
class Run:
    """The points after whole steps, and the gradients of each step."""

    path: np.ndarray
    gradients: int
    distances: np.ndarray

    @property
    def first_close(self):
        """Gradients until the distance stays small, or `None`."""
        far = np.flatnonzero(~(self.distances < CLOSE))
        first = far[-1] + 1 if len(far) else 0
        if first == len(self.distances):
            return None
        return int(first * self.gradients)

    @property
    def verdict(self):
        if self.first_close is not None:
            return f"{self.first_close}"
        if not self.distances[-1] < FAR:
            return "diverges"
        half = self.distances[len(self.distances) // 2]
        if self.distances[-1] < 0.5 * half:
            return "still falling"
        return "cycles"


def follow(problem, method, rate, gradients):
    problem.point = problem.start
    problem.game.compile(method.make(rate))
    batch = problem.steps(1)
    path = [problem.start]
    for _ in range(gradients // method.gradients):
        for _ in range(method.gradients):
            problem.game.train_on_batch(batch)
        path.append(problem.point)
        distance = np.linalg.norm(path[-1] - problem.solution)
        if not DONE < distance < FAR:
            break
    path = np.array(path)
    distances = np.linalg.norm(path - problem.solution, axis=1)
    return Run(path, method.gradients, distances)


# The slowest of the runs that do arrive.
PATIENCE = {
    ("forsaken", "RAPP"): 6,
    ("polar", "Lookahead(descent)"): 3,
    ("polar", "Lookahead(CEG+)"): 3,
}


def play(names, methods, gradients):
    """Runs by game and method."""
    runs = {name: {} for name in names}
    pairs = [(name, method) for name in names for method in methods]
    for name, chosen in track(pairs, "Playing"):
        problem = GAMES[name]()
        method, rate = METHODS[chosen], METHODS[chosen].rate / problem.L
        if name == "forsaken" and chosen in FORSAKEN:
            method = FORSAKEN[chosen]
            rate = method.rate
        patience = PATIENCE.get((name, chosen), 1)
        runs[name][chosen] = follow(problem, method, rate, patience * gradients)
    return runs


"""
## Pictures
"""

GREEN, RED, GREY = "#228833", "#cc3311", "#777777"
COLOURS = dict(
    zip(
        METHODS,
        ("#777777", "#aa3377", "#cc5511", "#ccaa22", "#228833")
        + ("#66aadd", "#224488"),
    )
)


def draw_paths(runs, path):
    """One panel per game and method: where the players go."""
    methods = list(next(iter(runs.values())))
    figure = Figure(
        figsize=(1.9 * len(methods), 1.95 * len(runs) + 0.3),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), len(methods), squeeze=False)
    first = next(iter(runs))
    for row, (name, own) in zip(panels, runs.items()):
        problem = GAMES[name]()
        limit = 2.2 if name in ("bilinear", "quadratic") else 1.6
        for axes, (method, run) in zip(row, own.items()):
            arrives = run.first_close is not None
            colour = GREEN if arrives else RED
            if run.verdict == "still falling":
                colour = GREY
            axes.plot(*run.path.T, "-", color=colour, linewidth=0.7)
            axes.plot(*run.path.T, ".", color=colour, markersize=1.8)
            axes.plot(*problem.start, "o", color="black", markersize=3.5)
            axes.plot(*problem.solution, "*", color="black", markersize=8)
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
            axes.set_aspect("equal")
            axes.set(xticks=[], yticks=[])
            text = f"{run.verdict} gradients" if arrives else run.verdict
            axes.text(
                0.5,
                0.02,
                text,
                transform=axes.transAxes,
                ha="center",
                fontsize=7.5,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
            if name == first:
                axes.set_title(method, fontsize=9)
        row[0].set_ylabel(name)
    figure.suptitle("From the dot to the star, and who arrives", fontsize=11)
    figure.savefig(path, dpi=80)


def draw_distances(runs, path):
    """Distance to the solution over the gradients, one panel per game."""
    figure = Figure(figsize=(3.1 * len(runs), 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axes, (name, own) in zip(panels, runs.items()):
        for method, run in own.items():
            spent = run.gradients * np.arange(len(run.distances))
            axes.semilogy(
                1 + spent,
                np.maximum(run.distances, 1e-8),
                color=COLOURS[method],
                linewidth=1.4,
                label=method,
            )
        axes.set_xscale("log")
        axes.set_title(name)
        axes.set_xlabel("gradients + 1")
        axes.set_ylim(1e-7, 20.0)
        tidy(axes)
    panels[0].set_ylabel("distance to the solution")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(COLOURS),
        frameon=False,
        fontsize=8.5,
    )
    figure.savefig(path, dpi=80)


def make_table(runs):
    table = Table(
        title=f"Gradients until the distance stays below {CLOSE:g} "
        f"({keras.backend.backend()}); below each game rho L"
    )
    table.add_column("Method", no_wrap=True)
    problems = {name: GAMES[name]() for name in runs}
    for name, problem in problems.items():
        table.add_column(
            f"{name}\n{problem.rho * problem.L:.2f}", justify="right"
        )
    for method in next(iter(runs.values())):
        table.add_row(method, *(own[method].verdict for own in runs.values()))
    return table


"""
## Which guarantee covers which run

- extragradient: `rho >= 0` and a rate of at most `1 / L`. At exactly `1 / L` it
  keeps its distance on the bilinear game.
- CEG+ at the rate `1 / L` with `alpha = 1/4`: `rho L > -3/8`, that is all games
  here but forsaken (on polar and global forsaken while no bound is active).
- RAPP at rates below `1 / L`: `rho L > -1/2` if rho is meant pairwise (for any
  two points instead of a point and the solution). That holds for bilinear and
  quadratic only, and for as many inner steps as it takes: on the quadratic game
  two are too few.
- Lookahead(descent) with more than two steps has no guarantee where rho is
  negative: tuned, it can be the fastest, and on the quadratic game it diverges.
- Lookahead(CEG+) inherits the condition of CEG+.

All else in the table is measured, not proved.
"""


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Methods for games, on games of two numbers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    here = pathlib.Path(__file__).parent / "images"
    add("--output", type=pathlib.Path, default=here, help="for the pictures")
    add("--gradients", type=at_least(40), default=2000, help="of each run")
    add("--games", nargs="+", choices=GAMES, default=list(GAMES))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = play(options.games, options.methods, options.gradients)
    console = Console()
    console.print(make_table(runs))
    draw_paths(runs, options.output / "min_max_paths.png")
    draw_distances(runs, options.output / "min_max_distances.png")
    numbers = {
        name: {
            method: {
                "first_close": run.first_close,
                "verdict": run.verdict,
                "last_distance": _finite(run.distances[-1]),
            }
            for method, run in own.items()
        }
        for name, own in runs.items()
    }
    path = options.output / "min_max.json"
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"Pictures and figures: {options.output}", soft_wrap=True)


def _finite(value):
    return float(value) if math.isfinite(value) else None


if __name__ == "__main__":
    main()
