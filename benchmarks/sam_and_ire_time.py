"""Time of SAM and IRE train steps, against the step of stock Keras.

    python benchmarks/sam_and_ire_time.py

One process per backend holds copies of the transformer of `models.py`, all
with AdamW and equal weights, which take turns of a few steps in `fit`, as in
`step_time.py`. Methods that do more at every tenth update have two kinds of
steps: the time of a step is the median of either kind, weighted 1 to 9.

Results go to `benchmarks/results/`, after each backend.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import step_time
from models import make_data

MODEL = "transformer"
EVERY = 10
# Ratios that are hoped for.
TARGETS = {
    "ire_all": 1.08,
    "ire_quarter": 1.04,
    "ire_second_moment": 1.01,
    "sam": 2.0,
    "sam_every_tenth": 1.12,
}
LABELS = {
    step_time.STOCK: "AdamW",
    step_time.AGAIN: "AdamW again (noise)",
    "ire_all": "IRE, all of the batch",
    "ire_quarter": "IRE, a quarter of the batch",
    "ire_second_moment": "IRE, Adam's second moment",
    "sam": "SAM",
    "sam_every_tenth": "SAM, every tenth update",
}


def make_optimizer(arm):
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


def measure(options):
    """The worker for one backend."""
    batch, turn = options["batch"], EVERY
    x, y = make_data(MODEL, (turn + 1) * batch)
    arms = {n: step_time.Arm(MODEL, make_optimizer(n)) for n in LABELS}
    made = dict.fromkeys(arms, 0)
    for name, arm in arms.items():
        made[name] += len(arm.train(x[: 3 * batch], y[: 3 * batch], batch))
    traced = sum(arm.traces for arm in arms.values())
    company = step_time.Company()
    times = {name: ([], []) for name in arms}
    deadline = time.monotonic() + options["seconds"]
    names, turns = list(arms), 0
    while turns < options["turns"] and time.monotonic() < deadline:
        shift = turns % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            seconds = arms[name].train(x, y, batch)
            for i, second in enumerate(seconds):
                extra = (made[name] + i) % EVERY == 0
                # The first step of `fit` also starts the input pipeline.
                if i > 0:
                    times[name][extra].append(second)
            made[name] += len(seconds)
        turns += 1
    traced = sum(arm.traces for arm in arms.values()) - traced
    return {
        "weights": arms[step_time.STOCK].model.count_params(),
        "turns": turns,
        "arms": summarise(times),
        "company": company.share(),
        "traced_again": traced > 0 and options["backend"] != "torch",
        "versions": step_time.probe(options)["versions"],
    }


def summarise(times):
    """Milliseconds and the ratio to stock of every arm.

    Args:
        times: For each arm the seconds of its usual steps, and those of the
            steps at which a method may do more.
    """
    costs = {}
    for arm, (usual, extra) in times.items():
        if arm in (step_time.STOCK, step_time.AGAIN):
            usual, extra = usual + extra, []
        cost = statistics.median(usual)
        if extra:
            cost = ((EVERY - 1) * cost + statistics.median(extra)) / EVERY
        costs[arm] = cost
    stock = costs[step_time.STOCK]
    return {
        arm: {
            "milliseconds": 1e3 * cost,
            "ratio": cost / stock,
            "steps": sum(map(len, times[arm])),
            "refreshes": len(times[arm][1]),
        }
        for arm, cost in costs.items()
    }


def to_markdown(results):
    machine = results["machine"]
    lines = [
        "# Time of SAM and IRE steps",
        "",
        f"Measured on {machine['device']} ({machine['processor']}, "
        f"{machine['cores']} cores) on {machine['date']} by `python "
        "benchmarks/sam_and_ire_time.py`: the transformer of two blocks of "
        f"width 128, batch {results['batch']}, everything around AdamW, "
        "refresh every 10 updates. A ratio is the time of a step over that "
        "of the stock step; of two kinds of steps the medians are weighted 1 "
        "to 9. A ratio is known no better than *AdamW again* differs from 1.",
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
            target = TARGETS.get(arm)
            verdict = ""
            if target is not None:
                missed = figures["ratio"] > target
                verdict = f"{target:.2f}, " + (
                    "**missed**" if missed else "met"
                )
            lines.append(
                f"| {LABELS[arm]} | {figures['milliseconds']:.1f} | "
                f"{figures['ratio']:.3f} | {verdict} | {figures['steps']} "
                f"({figures['refreshes']}) |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backends", nargs="+", default=list(step_time.BACKENDS))
    add("--batch", type=int, default=64)
    add("--turns", type=int, default=40, help="of 10 timed steps, each arm")
    add("--seconds", type=float, default=150.0, help="a backend, at most")
    add("--output", type=Path)
    options = parser.parse_args(arguments)
    machine = step_time.describe_machine("cpu")
    path = options.output or step_time.RESULTS / "sam_and_ire_time_cpu.json"
    results = {"machine": machine, "batch": options.batch, "entries": {}}
    if path.exists():
        found = json.loads(path.read_text())
        if found["batch"] == options.batch:
            results["entries"] = found["entries"]
    for backend in options.backends:
        print(f"{backend} ...", flush=True)
        answer = step_time.run_worker(
            "measure",
            {
                "backend": backend,
                "batch": options.batch,
                "turns": options.turns,
                "seconds": options.seconds,
            },
            script=__file__,
        )
        if "error" in answer:
            raise SystemExit(f"{backend} failed: {answer['error']}")
        results["entries"][backend] = answer
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(to_markdown(results))
    print(f"Written: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, _, options, answer = sys.argv
        Path(answer).write_text(json.dumps(measure(json.loads(options))))
    else:
        main()
