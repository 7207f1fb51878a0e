"""Time of the train steps of methods, against the step of their base.

    python benchmarks/method_time.py sam_and_ire
    python benchmarks/method_time.py layerwise
    python benchmarks/method_time.py averaging
    python benchmarks/method_time.py interpolation

One process per backend holds copies of one model, with equal weights, which
take turns of a few steps in `fit`, as in `step_time.py`. Methods that do more
at every tenth update have two kinds of steps: the time of a step is the first
quartile of either kind, weighted 1 to 9. Of methods that go in short cycles it
is the mean over the places in the cycle of the first quartiles there.

Results go to `benchmarks/results/`, after each backend.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path

import step_time
from models import make_data

EVERY = 10


@dataclasses.dataclass(frozen=True)
class Suite:
    """Methods that are timed together.

    Attributes:
        title: Of the table.
        model: A name in `models.py`.
        batch: Rows a step.
        setting: What the reader needs to know of it.
        arms: For each arm its label.
        targets: Ratio that is hoped for, by arm; a number, or one per backend.
        make: From an arm to its optimizer; any other arm is the base.
        bases: For arms that are not measured against the first one, the arm
            that they are.
        cycles: For arms that go in cycles their length in steps.
    """

    title: str
    model: str
    batch: int
    setting: str
    arms: dict
    targets: dict
    make: callable
    bases: dict = dataclasses.field(default_factory=dict)
    cycles: dict = dataclasses.field(default_factory=dict)

    def kind(self, arm, step):
        """Which of its kinds a step of an arm is, counted from 0."""
        if arm in self.cycles:
            return step % self.cycles[arm]
        return int(step % EVERY == 0)

    def target(self, arm, backend):
        target = self.targets.get(arm)
        return target.get(backend) if isinstance(target, dict) else target


def _sam_or_ire(arm):
    import keras

    import keras_stab

    base = keras.optimizers.AdamW(1e-3)
    makers = {
        "ire_all": lambda: keras_stab.IRE(base, fisher_fraction=1.0),
        "ire_quarter": lambda: keras_stab.IRE(base, fisher_fraction=0.25),
        "ire_second_moment": lambda: keras_stab.IRE(
            base, curvature="second_moment"
        ),
        "sam": lambda: keras_stab.SAM(base),
        "sam_every_tenth": lambda: keras_stab.SAM(base, interval=EVERY),
    }
    return makers[arm]() if arm in makers else base


def _layerwise(arm):
    import keras

    import keras_stab

    if arm == "adam":
        return keras.optimizers.Adam(1e-3)
    if arm == "lamb":
        return keras_stab.LAMB(1e-3)
    kinds = {"lars": keras_stab.LARS, "tvlars": keras_stab.TVLARS}
    if arm not in kinds:
        return keras.optimizers.SGD(0.01, momentum=0.9)
    clock = {"decay_rate": 0.1, "delay": 50.0} if arm == "tvlars" else {}
    return kinds[arm](0.1, weight_decay=1e-4, **clock)


def _averaging(arm):
    import keras

    import keras_stab

    if arm == "schedule_free":
        return keras_stab.ScheduleFree.adamw(1e-3)
    base = keras.optimizers.AdamW(1e-3)
    arguments = {
        "mean": {},
        "mean_plain": {"compensated": False},
        "ema": {"method": "ema"},
        "mean_tenth": {"period": EVERY},
    }
    if arm not in arguments:
        return base
    return keras_stab.WeightAveraging(base, **arguments[arm])


def _interpolation(arm):
    import keras

    import keras_stab

    around_adam = {
        "lookahead": keras_stab.Lookahead,
        "extragradient": keras_stab.ExtraGradient,
        "optimistic": keras_stab.OptimisticGradient,
        "past": keras_stab.PastExtraGradient,
    }
    plain = {
        "sgd": keras.optimizers.SGD,
        "rapp": keras_stab.RAPP,
        "cegplus": keras_stab.CEGPlus,
    }
    if arm in plain:
        return plain[arm](0.01)
    return around_adam.get(arm, lambda inner: inner)(
        keras.optimizers.Adam(1e-3)
    )


_PERIOD_1 = {"jax": 1.03, "tensorflow": 1.03, "torch": 1.08}
_EVERYWHERE = {"jax": 1.05, "tensorflow": 1.05, "torch": 1.10}
SUITES = {
    "sam_and_ire": Suite(
        "Time of SAM and IRE steps",
        "transformer",
        64,
        "the transformer of two blocks of width 128, everything around AdamW, "
        "refresh every 10 updates",
        {
            step_time.STOCK: "AdamW",
            step_time.AGAIN: "AdamW again (noise)",
            "ire_all": "IRE, all of the batch",
            "ire_quarter": "IRE, a quarter of the batch",
            "ire_second_moment": "IRE, Adam's second moment",
            "sam": "SAM",
            "sam_every_tenth": "SAM, every tenth update",
        },
        {
            "ire_all": 1.08,
            "ire_quarter": 1.04,
            "ire_second_moment": 1.01,
            "sam": 2.0,
            "sam_every_tenth": 1.12,
        },
        _sam_or_ire,
    ),
    "layerwise": Suite(
        "Time of LARS and TVLARS steps",
        "resnet",
        64,
        "a residual network of 20 layers with 65 variables on images of 32 by "
        "32, against SGD with momentum; LAMB against Adam",
        {
            step_time.STOCK: "SGD",
            step_time.AGAIN: "SGD again (noise)",
            "lars": "LARS",
            "tvlars": "TVLARS",
            "adam": "Adam",
            "lamb": "LAMB",
        },
        {"lars": _EVERYWHERE, "tvlars": _EVERYWHERE},
        _layerwise,
        bases={"lamb": "adam"},
    ),
    "averaging": Suite(
        "Time of steps with weight averaging",
        "transformer",
        64,
        "the transformer of two blocks of width 128, `WeightAveraging` around "
        "AdamW; the plain mean of every update keeps what rounding cuts off, "
        "which takes a second slot",
        {
            step_time.STOCK: "AdamW",
            step_time.AGAIN: "AdamW again (noise)",
            "mean": "mean of every update",
            "mean_plain": "mean, not compensated",
            "ema": "EMA",
            "mean_tenth": "mean of every tenth update",
            "schedule_free": "ScheduleFree",
        },
        {
            "mean": _PERIOD_1,
            "mean_plain": _PERIOD_1,
            "ema": _PERIOD_1,
            "mean_tenth": 1.01,
        },
        _averaging,
    ),
    "interpolation": Suite(
        "Time of the steps of Lookahead, RAPP and extragradient",
        "wide",
        256,
        "a network of three dense layers with 10 million weights; a step is "
        "one gradient. Lookahead with a period of 5 and the others around "
        "Adam are measured against Adam, RAPP with 3 inner steps and CEGPlus "
        "against SGD",
        {
            step_time.STOCK: "Adam",
            step_time.AGAIN: "Adam again (noise)",
            "lookahead": "Lookahead, Adam inside",
            "extragradient": "ExtraGradient, Adam inside",
            "optimistic": "OptimisticGradient, Adam inside",
            "past": "PastExtraGradient, Adam inside",
            "sgd": "SGD",
            "rapp": "RAPP",
            "cegplus": "CEGPlus",
        },
        {"lookahead": 1.05, "rapp": 1.05},
        _interpolation,
        bases={"rapp": "sgd", "cegplus": "sgd"},
        cycles={"lookahead": 5, "rapp": 3, "extragradient": 2, "cegplus": 2},
    ),
}


def measure(options):
    """The worker for one backend."""
    suite = SUITES[options["suite"]]
    batch, turn = options["batch"], EVERY
    x, y = make_data(suite.model, (turn + 1) * batch)
    arms = {n: step_time.Arm(suite.model, suite.make(n)) for n in suite.arms}
    made = dict.fromkeys(arms, 0)
    for name, arm in arms.items():
        made[name] += len(arm.train(x[: 3 * batch], y[: 3 * batch], batch))
    traced = sum(arm.traces for arm in arms.values())
    company = step_time.Company()
    # Steps of special kinds apart: one in ten, or each place in a cycle.
    times = {n: [[] for _ in range(suite.cycles.get(n, 2))] for n in arms}
    deadline = time.monotonic() + options["seconds"]
    names, turns = list(arms), 0
    while turns < options["turns"] and time.monotonic() < deadline:
        shift = turns % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            seconds = arms[name].train(x, y, batch)
            for i, second in enumerate(seconds):
                # The first step of `fit` also starts the input pipeline.
                if i > 0:
                    times[name][suite.kind(name, made[name] + i)].append(second)
            made[name] += len(seconds)
        turns += 1
    traced = sum(arm.traces for arm in arms.values()) - traced
    return {
        "weights": arms[step_time.STOCK].model.count_params(),
        "turns": turns,
        "arms": summarise(times, suite),
        "company": company.share(),
        "traced_again": traced > 0 and options["backend"] != "torch",
        "versions": step_time.probe(options)["versions"],
    }


def first_quartile(seconds):
    """Steadier than the median where other machines share the processor."""
    return sorted(seconds)[len(seconds) // 4]


def summarise(times, suite):
    """Milliseconds and the ratio to its base of every arm.

    Args:
        times: For each arm a list of seconds for each kind of its steps.
        suite: The `Suite` of the arms.
    """
    costs = {}
    for arm, kinds in times.items():
        if arm in suite.cycles:
            costs[arm] = statistics.fmean(map(first_quartile, kinds))
            continue
        usual, extra = kinds
        if arm in (step_time.STOCK, step_time.AGAIN):
            usual, extra = usual + extra, []
        costs[arm] = first_quartile(usual)
        if extra:
            special = first_quartile(extra)
            costs[arm] = ((EVERY - 1) * costs[arm] + special) / EVERY
    return {
        arm: {
            "milliseconds": 1e3 * cost,
            "ratio": cost / costs[suite.bases.get(arm, step_time.STOCK)],
            "steps": sum(map(len, times[arm])),
            "refreshes": len(times[arm][-1]),
        }
        for arm, cost in costs.items()
    }


def to_markdown(results):
    machine, suite = results["machine"], SUITES[results["suite"]]
    lines = [
        f"# {suite.title}",
        "",
        f"Measured on {machine['device']} ({machine['processor']}, "
        f"{machine['cores']} cores) on {machine['date']} by `python "
        f"benchmarks/method_time.py {results['suite']}`: {suite.setting}, "
        f"batch {results['batch']}. A ratio is the time of a step over that "
        "of the first optimizer, first quartiles of both; those of two kinds "
        "of steps are weighted 1 to 9. A ratio is known no better than the "
        "second line differs from 1.",
        "",
    ]
    for backend, entry in results["entries"].items():
        versions = ", ".join(f"{k} {v}" for k, v in entry["versions"].items())
        lines += [f"## {backend}", "", f"{versions}.", ""]
        busy = entry["company"] or 0.0
        if busy > step_time.BUSY:
            lines += [
                f"**The machine was busy:** other processes took {busy:.0%} "
                "of the processor; these figures cannot be relied on.",
                "",
            ]
        lines += [
            "| Optimizer | ms a step | ratio | target | steps (special) |",
            "| --- | --- | --- | --- | --- |",
        ]
        for arm, figures in entry["arms"].items():
            target = suite.target(arm, backend)
            verdict = ""
            if target is not None:
                missed = figures["ratio"] > target
                verdict = f"{target:.2f}, " + (
                    "**missed**" if missed else "met"
                )
            lines.append(
                f"| {suite.arms[arm]} | {figures['milliseconds']:.1f} | "
                f"{figures['ratio']:.3f} | {verdict} | {figures['steps']} "
                f"({figures['refreshes']}) |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("suite", choices=SUITES)
    add("--backends", nargs="+", default=list(step_time.BACKENDS))
    add("--batch", type=int, help="rows per step, if not the usual")
    add("--turns", type=int, default=40, help="of 10 timed steps, each arm")
    add("--seconds", type=float, default=150.0, help="a backend, at most")
    add("--output", type=Path)
    options = parser.parse_args(arguments)
    machine = step_time.describe_machine("cpu")
    name = f"{options.suite}_time_cpu.json"
    path = options.output or step_time.RESULTS / name
    batch = options.batch or SUITES[options.suite].batch
    results = {
        "machine": machine,
        "suite": options.suite,
        "batch": batch,
        "entries": {},
    }
    if path.exists():
        found = json.loads(path.read_text())
        if found["batch"] == batch:
            results["entries"] = found["entries"]
    asked = {
        "suite": options.suite,
        "batch": batch,
        "turns": options.turns,
        "seconds": options.seconds,
    }
    for backend, answer in step_time.answers(__file__, options.backends, asked):
        results["entries"][backend] = answer
        step_time.write(results, path, to_markdown)
    print(f"Written: {path}")


if __name__ == "__main__":
    step_time.run_script(measure, main)
