"""Two larger studies of stability, for one GPU and at most ten minutes.

    python benchmarks/stability_gpu.py --data folder

1. All layers of a pretrained encoder on 64 rows of SST-2: AdamW against GRAIN
   with 4 and 8 groups, 64 paired seeds, tested on 872 rows.
2. ResNet-20 on CIFAR-10 in batches of 4,096: one run of SGD, LARS, TVLARS and
   LAMB each. One run decides nothing; it shows what trains at all.

It says first how long it will take. Killed and started again, it goes on where
it was. `--quick` needs no data and no GPU; its figures are worth nothing.
"""

import argparse
import functools
import json
import os
import pathlib
import time

ROOT = pathlib.Path(__file__).resolve().parent
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras  # noqa: E402
import numpy as np  # noqa: E402
from stability import catalogue  # noqa: E402
from stability import on_gpu  # noqa: E402
from stability import study  # noqa: E402

from keras_stab.diagnostics.report.run_plan import RunSeeds  # noqa: E402

FINE_TUNING, LARGE_BATCH = "sst2_all_layers", "resnet_large_batch"
TASKS = {
    FINE_TUNING: on_gpu.FineTuning,
    LARGE_BATCH: on_gpu.ResNetLargeBatch,
}
QUICK = {
    FINE_TUNING: functools.partial(on_gpu.FineTuning, 16, 1, (1e-3, 1e-2)),
    LARGE_BATCH: functools.partial(
        on_gpu.ResNetLargeBatch, 32, (40, 16, 16), 1, 16
    ),
}
SEED = RunSeeds(0, 0)  # of the large-batch runs


def main(arguments=None):
    options = parse(arguments)
    catalogue.TASKS |= QUICK if options.quick else TASKS
    plan = study.Plan(
        data=None if options.quick else options.data,
        folder=options.folder,
        results=options.results,
        seeds=2 if options.quick else options.seeds,
        order_seeds=0,
        tuning_seeds=study.TUNING_SEEDS[: 2 if options.quick else 4],
    )
    print(estimate(plan), flush=True)
    show_fine_tuning(study.run(FINE_TUNING, plan))
    run_large_batch(plan)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        type=pathlib.Path,
        help="folder with glue/SST-2 and cifar10_jpeg",
    )
    add("--seeds", type=int, default=64, help="of every arm (default: 64)")
    add("--quick", action="store_true", help="tiny, without data")
    add(
        "--folder",
        type=pathlib.Path,
        default=ROOT.parent / "build" / "stability_gpu",
        help="of finished runs (default: build/stability_gpu)",
    )
    add(
        "--results",
        type=pathlib.Path,
        default=ROOT / "results" / "stability_gpu",
        help="of the results (default: benchmarks/results/stability_gpu)",
    )
    options = parser.parse_args(arguments)
    if options.data is None and not options.quick:
        parser.error("--data, please, or --quick")
    if options.seeds < 2:
        parser.error("--seeds from 2, please")
    return options


def estimate(plan):
    """One line: how long the runs that are missing will take."""
    task = catalogue.TASKS[FINE_TUNING]()
    missing = max(0, plan.count(task) - plan.finished(FINE_TUNING))
    compiling, running = timed(plan, task) if missing else (0.0, 0.0)
    total = missing * running + (len(task.arms) - 1) * compiling
    left = [a for a in on_gpu.ResNetLargeBatch.arms if a not in finished(plan)]
    return (
        f"Fine-tuning: {missing} runs of {running:.2f} s and compiling, about "
        f"{total / 60:.1f} minutes on {keras.backend.backend()}. Then "
        f"{len(left)} runs of ResNet-20, about a minute each on a GPU."
    )


def timed(plan, task):
    """Seconds to compile an arm, and of a run once it is compiled."""
    study.prepared(FINE_TUNING, plan.data, plan.folder)
    trainer = study.Trainer(FINE_TUNING, plan, "held_out")
    seconds = []
    for _ in range(2):
        optimizer = study.maker("base", task.rates[0], task)()
        start = time.monotonic()
        trainer(optimizer, SEED)
        seconds.append(time.monotonic() - start)
    return max(0.0, seconds[0] - seconds[1]), seconds[1]


def show_fine_tuning(results):
    arms = results["spreads"]["everything"]["arms"]
    for arm, own in arms.items():
        scores = np.array(own["scores"], dtype="float64")
        print(
            f"{arm:8} rate {results['rates'][arm]:g}: accuracy "
            f"{np.nanmean(scores):.2f} +- {np.nanstd(scores, ddof=1):.2f}, "
            f"{own['failed']} of {len(scores)} failed"
        )


def finished(plan):
    """The large-batch runs that are there, by arm."""
    path = plan.results / f"{LARGE_BATCH}.json"
    return json.loads(path.read_text())["arms"] if path.is_file() else {}


def run_large_batch(plan):
    """One run of every arm that is missing, written when it is done."""
    task = study.prepared(LARGE_BATCH, plan.data, plan.folder)
    found = finished(plan)
    for arm in task.arms:
        if arm not in found:
            optimizer = study.maker(arm, task.rates[0], task)()
            start = time.monotonic()
            result = study.Trainer(LARGE_BATCH, plan, "test")(optimizer, SEED)
            found[arm] = {
                "accuracy": round(float(result[task.metric]), 2),
                "seconds": round(time.monotonic() - start, 1),
            }
            study.write(
                plan.results / f"{LARGE_BATCH}.json",
                {"title": task.title, "steps": task.steps, "arms": found},
            )
        print(
            f"{arm:8} accuracy {found[arm]['accuracy']:.2f} after "
            f"{found[arm]['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
