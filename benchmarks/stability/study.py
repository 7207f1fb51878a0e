"""The study of one task: rates, then runs, then a small file of results."""

import dataclasses
import functools
import json
import os
import pathlib
import time

import keras
import numpy as np

import keras_stab
from stability import catalogue
from stability import grain_figures
from stability.arms import ARMS
from stability.task import TUNING_SEEDS

# What differs between the runs of an arm, and what `stability_report` calls
# it.
SPREADS = {"everything": "both", "order": "order"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run, and where things are.

    Attributes:
        data: Path with the folders of the data sets, or `None` for tasks that
            need none.
        folder: Path of finished runs and of cached features.
        results: Path of the files of results.
        seeds: Int, of every arm.
        tuning_seeds: Seeds of the search for rates.
        arms: Keys of arms to run; `None` for all of the task.
        order_seeds: Int, runs of each arm that differ in the order alone.
    """

    data: pathlib.Path | None
    folder: pathlib.Path
    results: pathlib.Path
    seeds: int = 48
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    arms: tuple[str, ...] | None = None
    order_seeds: int = 48

    def arms_of(self, task):
        """Keys of the arms of a task, its base first."""
        if self.arms is None:
            return task.arms
        return task.arms[:1] + tuple(
            arm for arm in task.arms[1:] if arm in self.arms
        )

    def searched(self, task):
        """Keys of the arms that search for a rate of their own."""
        return [a for a in self.arms_of(task) if ARMS[a].rates == "search"]

    def count(self, task):
        """Number of runs of a task."""
        searches = len(self.searched(task)) * len(task.rates)
        return searches * len(self.tuning_seeds) + len(self.arms_of(task)) * (
            self.seeds + self.order_seeds
        )

    def finished(self, name):
        """Number of finished runs of a task."""
        return sum(1 for _ in (self.folder / name).glob("*/runs/*-*.json"))


@functools.cache
def prepared(name, data, folder):
    """A task whose data is read, with its compiled models; once a process."""
    task = catalogue.TASKS[name]()
    task.prepare(data, folder / "cache")
    return task


class Trainer:
    """Trains and scores once: what `stability_report` calls.

    Args:
        name: String, key of the task.
        plan: The `Plan`.
        part: `"held_out"` or `"test"`.
    """

    def __init__(self, name, plan, part):
        self.name, self.plan, self.part = name, plan, part

    def __call__(self, optimizer, seeds):
        task = prepared(self.name, self.plan.data, self.plan.folder)
        # To prepare, and to make the optimizer, may have drawn numbers.
        keras.utils.set_random_seed(seeds.initialisation)
        arm = ARMS[optimizer.name.split("-")[0]]
        model = task.models.rewound(optimizer)
        start = time.process_time()
        task.train(model, seeds, arm)
        used = time.process_time() - start
        return {**task.score(model, self.part), "cpu_seconds": used}


def run(name, plan):
    """Does what is missing of a task; returns and writes its results."""
    task = catalogue.TASKS[name]()
    tuning = search(name, task, plan)
    rates = picked_rates(task, plan, tuning)
    results = {
        "task": name,
        "title": task.title,
        "metric": task.metric,
        "unit": task.unit,
        "higher_is_better": task.higher_is_better,
        "base": type(task.make_base(task.rates[0])).__name__,
        "steps": task.steps,
        "grid": list(task.rates),
        "backend": keras.config.backend(),
        "keras": keras.version(),
        "keras_stab": keras_stab.__version__,
        "tuning_seeds": list(plan.tuning_seeds),
        "tuning": tuning,
        "rates": rates,
        "spreads": {},
    }
    for spread, vary in SPREADS.items():
        seeds = plan.seeds if spread == "everything" else plan.order_seeds
        if seeds:
            report = compare(name, task, plan, rates, seeds, spread, vary)
            results["spreads"][spread] = summary(report, task, seeds)
            write(plan.results / f"{name}.json", results)
    if task.watches_grain:
        results["grain"] = grain_figures.watch(
            functools.partial(watched, name, plan),
            rates[task.arms[0]],
            plan.tuning_seeds,
        )
        write(plan.results / f"{name}.json", results)
    return results


def watched(name, plan, arm, rate, seed, callback):
    """Trains one run under the eyes of a callback."""
    task = prepared(name, plan.data, plan.folder)
    keras.utils.set_random_seed(seed)
    model = task.models.rewound(maker(arm, rate, task)())
    seeds = keras_stab.diagnostics.RunSeeds(seed, seed)
    task.train(model, seeds, ARMS[arm], [callback])


def search(name, task, plan):
    """Dict from arm to a dict from rate to the scores of its tuning runs."""
    grid = {
        f"{arm}@{rate:g}": (arm, rate)
        for arm in plan.searched(task)
        for rate in task.rates
    }
    report = report_of(
        Trainer(name, plan, "held_out"),
        {label: maker(*pair, task) for label, pair in grid.items()},
        list(plan.tuning_seeds),
        plan.folder / name / "tuning",
        task,
        questions=("mean",),
    )
    tuning = {}
    for label, (arm, rate) in grid.items():
        scores = tidy(report.scores(label))
        tuning.setdefault(arm, {})[f"{rate:g}"] = scores
    return tuning


def picked_rates(task, plan, tuning):
    """Dict from arm to the rate with the best mean; a failed run is worst."""
    rates = {}
    for arm in plan.arms_of(task):
        own = tuning[arm if arm in tuning else task.arms[0]]
        sign = 1 if task.higher_is_better else -1
        means = {
            rate: np.mean([-np.inf if s is None else sign * s for s in scores])
            for rate, scores in own.items()
        }
        factor = 1.0 if arm in tuning else ARMS[arm].rates
        rates[arm] = factor * float(max(means, key=means.get))
    return rates


def compare(name, task, plan, rates, seeds, spread, vary):
    """The `StabilityReport` of all arms on the test rows."""
    return report_of(
        Trainer(name, plan, "test"),
        {arm: maker(arm, rate, task) for arm, rate in rates.items()},
        seeds,
        plan.folder / name / spread,
        task,
        vary=vary,
    )


def report_of(trainer, arms, seeds, folder, task, **options):
    return keras_stab.stability_report(
        trainer,
        arms,
        seeds=seeds,
        folder=folder,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        failure_score=task.failure_score,
        unit=task.unit,
        settings={"task": task.settings(), "part": trainer.part},
        pictures=False,
        progress=False,
        **options,
    )


def maker(arm, rate, task):
    """A function that makes a new optimizer of an arm."""
    # A schedule is compiled into the step: another rate is another model.
    key = f"{arm}-{rate:g}" if ARMS[arm].compiles_rate else arm
    return functools.partial(ARMS[arm].optimizer, key, task, rate)


def summary(report, task, seeds):
    """What the page needs of a report, small enough to be kept."""
    arms = {}
    for arm, own in report.arms.items():
        arms[arm] = {
            "scores": tidy(report.scores(arm)),
            "failed": own.failed,
            "agreement": own.agreement,
            "flip_floor": own.flip_floor,
            "binomial_floor": own.binomial_floor,
            "cpu_seconds": float(np.median(report.column(arm, "cpu_seconds"))),
        }
    return {"seeds": seeds, "arms": arms}


def tidy(scores):
    """List of scores for JSON, `None` for failed runs."""
    return [round(float(s), 5) if np.isfinite(s) else None for s in scores]


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
