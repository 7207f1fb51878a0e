"""Does it help? Trains arms on small tasks, many seeds each, and compares.

    python benchmarks/stability_study.py --data folder       # everything
    python benchmarks/stability_study.py --data folder --tasks sst2_64
    python benchmarks/stability_study.py --page              # the page alone

Kill it and start it again: it goes on where it was. Every task has one file in
`benchmarks/results/stability`, written when its runs are complete; the page
`guides/does_it_help.md` and its picture are made from these files.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import sys
import threading
import traceback

ROOT = pathlib.Path(__file__).resolve().parent
os.environ.setdefault("KERAS_BACKEND", "jax")
# Each process has one thread: side by side they would disturb each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

from rich.progress import BarColumn  # noqa: E402
from rich.progress import MofNCompleteColumn  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.progress import TextColumn  # noqa: E402
from rich.progress import TimeElapsedColumn  # noqa: E402
from rich.progress import TimeRemainingColumn  # noqa: E402
from stability import catalogue  # noqa: E402
from stability import page  # noqa: E402
from stability import study  # noqa: E402
from stability.arms import ARMS  # noqa: E402

# Seconds between two looks at what is finished.
LOOK_EVERY = 2.0


def main(arguments=None):
    options = parse(arguments)
    if not options.page:
        failed = run_all(options.tasks, options.plan, options.processes)
        if failed:
            sys.exit(f"Not finished: {', '.join(failed)}")
    print(f"Page: {page.write(options.plan.results, options.guide)}")


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        type=pathlib.Path,
        default=os.environ.get("STABILITY_DATA"),
        help="folder of the data sets (default: $STABILITY_DATA)",
    )
    add("--tasks", nargs="+", choices=list(catalogue.TASKS), metavar="TASK")
    add("--arms", nargs="+", choices=list(ARMS), metavar="ARM")
    add("--seeds", type=int, default=48, help="of every arm (default: 48)")
    add(
        "--order-seeds",
        type=int,
        help="runs of every arm that differ in the order of the rows alone "
        "(default: as many)",
    )
    add("--processes", type=int, default=1, help="tasks side by side")
    add(
        "--folder",
        type=pathlib.Path,
        default=ROOT.parent / "build" / "stability",
        help="of finished runs (default: build/stability)",
    )
    add(
        "--results",
        type=pathlib.Path,
        default=ROOT / "results" / "stability",
        help="of the results (default: benchmarks/results/stability)",
    )
    add(
        "--guide",
        type=pathlib.Path,
        default=ROOT.parent / "guides" / "does_it_help.md",
        help="the page to write (default: guides/does_it_help.md)",
    )
    add("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or list(catalogue.TASKS)
    if min(options.seeds, options.processes) < 1 or options.seeds < 2:
        parser.error("--seeds from 2 and --processes from 1, please")
    orders = options.order_seeds
    options.plan = study.Plan(
        data=options.data and pathlib.Path(options.data),
        folder=options.folder,
        results=options.results,
        seeds=options.seeds,
        order_seeds=options.seeds if orders is None else orders,
        arms=options.arms and tuple(options.arms),
    )
    return options


def run_all(tasks, plan, processes):
    """Runs tasks side by side; returns those that did not finish."""
    made = {name: catalogue.TASKS[name]() for name in tasks}
    total = sum(plan.count(task) for task in made.values())
    if processes > 1:
        pool = concurrent.futures.ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=end_with_parent,
        )
    else:
        # A thread beside the one that draws the bar.
        pool = concurrent.futures.ThreadPoolExecutor(1)
    failed = []
    with pool, progress_bar() as bar:
        row = bar.add_task("Training", total=total)
        futures = {pool.submit(study.run, name, plan): name for name in tasks}
        waiting = set(futures)
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, LOOK_EVERY)
            bar.update(row, completed=sum(map(plan.finished, tasks)))
            for future in done:
                error = future.exception()
                name = futures[future]
                if error is not None:
                    failed.append(name)
                    bar.print(f"{name}: {error!r}")
                    traceback.print_exception(error)
                else:
                    bar.print(f"{name}: finished")
    return failed


def end_with_parent():
    """Ends this process when the one that started it is killed."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def progress_bar():
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


if __name__ == "__main__":
    main()
