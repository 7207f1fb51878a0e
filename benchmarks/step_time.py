"""Time and memory of train steps, against the steps of stock Keras.

    python benchmarks/step_time.py            # everything, about 20 minutes
    python benchmarks/step_time.py --quick    # does it run at all?

One process per backend, model and number of threads holds copies of the model
with equal weights: stock AdamW, stock AdamW again (what differs between these
two is noise), the methods, and the other stock optimizers that these are
measured against. They take turns of 20 steps. More processes measure memory,
methods with `torch.compile`, and the K x K problem of GRAIN.

Results go to `benchmarks/results/` after each process; what is there already,
from the same code, versions, machine and options, is not measured again.
"""

import argparse
import concurrent.futures
import contextlib
import json
import re
import signal
import sys
from pathlib import Path

from timing import arms
from timing import measure
from timing import memory
from timing import results as files
from timing import workers
from timing.markdown import to_markdown

TASKS = {
    "probe": workers.probe,
    "time": measure.measure_time,
    "compiled": measure.measure_compiled,
    "memory": memory.measure_memory,
    "solver": measure.measure_solver,
}
# Seconds after which `torch.compile` is given up.
COMPILE_TIMEOUT = 240


def main(arguments=None):
    options = parse(arguments)
    probes = probe_all(options.backends)
    if not probes:
        raise SystemExit("None of the backends is installed")
    devices = [probed["device"] for probed in probes.values()]
    device = next((d for d in devices if d != "cpu"), "cpu")
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    suffix = "_quick" if options.quick else ""
    path = options.output or files.RESULTS / f"step_time_{slug}{suffix}.json"
    machine = workers.describe_machine(device)
    settings = {
        "turns": options.turns,
        "seconds": options.seconds,
        "method": files.METHOD,
        "processor": machine["processor"],
        "cores": machine["cores"],
    }
    results = {"machine": machine, "entries": []}
    if path.exists() and not options.fresh:
        found = json.loads(path.read_text())["entries"]
        results["entries"] = [
            entry
            for entry in found
            if files.current([entry], settings_of(entry["job"], settings))
        ]
        dropped = len(found) - len(results["entries"])
        if dropped:
            print(f"Thrown away: {dropped} results of other code or machines")
    jobs = files.make_jobs(
        workloads(options), list(probes), options.threads, options.kinds
    )
    plans = [
        (job, {**settings_of(job, settings), **probes[job["backend"]]})
        for job in jobs
    ]
    left = [job for job, own in plans if files.is_missing(results, job, own)]
    seconds = sum(
        files.expected_seconds(job, options.seconds) / at_once(job["kind"])
        for job in left
    )
    print(f"{len(left)} jobs, about {seconds / 60:.0f} minutes")
    # A worker must not outlive an interrupted benchmark and disturb the next.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(results, path, plans)
    files.write(results, path, to_markdown)
    print(f"\nWritten: {path} and {path.with_suffix('.md').name}")
    failures = files.failures(results)
    for failure in failures:
        print(f"Failed: {failure}")
    return 1 if failures else 0


def settings_of(job, settings):
    """The settings, with the code that this job runs."""
    return {**settings, "source": files.source_of(job)}


def workloads(options):
    known = arms.ALL_WORKLOADS if options.models else arms.WORKLOADS
    return [
        workload
        for workload in known
        if not options.models or workload.model in options.models
    ]


def run(results, path, plans):
    """Does what is missing, one kind after the other.

    Args:
        results: What is there already; changed in place.
        path: Where the results are written after every worker.
        plans: List of pairs, a job and its settings.
    """
    from rich import progress

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    ) as bar:
        for kind in files.KINDS:
            own = [plan for plan in plans if plan[0]["kind"] == kind]
            left = [p for p in own if files.is_missing(results, *p)]
            if not own:
                continue
            task = bar.add_task(kind, total=len(own))
            bar.advance(task, len(own) - len(left))
            alone = any(settings["device"] != "cpu" for _, settings in own)
            with _pool(1 if alone else at_once(kind)) as pool:
                started = {
                    pool.submit(
                        workers.run_worker,
                        kind,
                        worker_options(job, settings),
                        __file__,
                    ): (job, settings)
                    for job, settings in left
                }
                for done in concurrent.futures.as_completed(started):
                    files.put(results, *started[done], done.result())
                    files.write(results, path, to_markdown)
                    bar.advance(task)


def at_once(kind):
    """How many workers may run together on a processor."""
    # Compiling takes long, and CPU time bears company; memory does not mind
    # it at all.
    most = {"compiled": 2, "memory": 4}.get(kind, 1)
    return min(most, workers.cores())


@contextlib.contextmanager
def _pool(count):
    """Threads that, when interrupted, do not start what is left to do."""
    pool = concurrent.futures.ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def worker_options(job, settings):
    """What a worker is told."""
    options = {"backend": job["backend"], "turns": settings["turns"]}
    if job["kind"] == "solver":
        groups = list(arms.SOLVER_TARGETS)
        return {**options, "groups": groups, "problems": 100, "threads": 1}
    workload = next(w for w in arms.ALL_WORKLOADS if w.name == job["workload"])
    options.update(
        model=workload.model,
        batch=workload.batch,
        seconds=settings["seconds"] * workload.seconds,
    )
    if job["kind"] == "time":
        options.update(threads=job["threads"])
        options["arms"] = workload.all_arms(job["threads"])
        if job["threads"] != 1:
            options["seconds"] /= 2
        return options
    options["arm"] = job["arm"]
    if job["kind"] == "compiled":
        options.update(threads=1, timeout=COMPILE_TIMEOUT)
    return options


def probe_all(backends):
    """Device and versions of each backend that is installed."""
    probes = {}
    for backend in backends:
        answer = workers.run_worker("probe", {"backend": backend}, __file__)
        if "error" in answer:
            reason = answer["error"].strip().splitlines()[-1]
            print(f"Left out: {backend} ({reason})")
        else:
            probes[backend] = answer
    return probes


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    backends = list(workers.BACKENDS)
    add("--backends", nargs="+", choices=backends, default=backends)
    add(
        "--models",
        nargs="+",
        choices=arms.MODELS,
        help="some, or more than the usual: "
        + ", ".join(w.model for w in arms.MORE_WORKLOADS),
    )
    add(
        "--threads",
        nargs="+",
        type=lambda text: int(text) if text == "1" else text,
        choices=(1, "all"),
        default=[1, "all"],
    )
    add(
        "--kinds",
        nargs="+",
        choices=files.KINDS,
        default=list(files.KINDS),
        help="of figures",
    )
    add("--turns", type=int, default=20, help="of 20 steps, at most")
    add(
        "--seconds",
        type=float,
        default=1.0,
        help="times as long as usual; slow models make more steps",
    )
    add("--quick", action="store_true", help="few steps")
    add("--output", type=Path, help="path of the JSON file")
    add("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args(arguments)
    if options.quick:
        options.turns = 1
        options.threads = [1]
    return options


if __name__ == "__main__":
    workers.run_script(TASKS, main)
