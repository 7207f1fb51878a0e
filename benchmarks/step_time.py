"""Time and memory of a GRAIN train step, against the step of stock Keras.

    python benchmarks/step_time.py            # everything, below 40 minutes
    python benchmarks/step_time.py --quick    # does it run at all?

One process per backend, model and batch size holds four copies of the model,
with equal weights: stock AdamW, stock AdamW again (what differs between these
two is noise), GRAIN around AdamW with K = 4 and with K = 8. They take turns
of a few steps. A second set of processes, one per copy, measures memory.

Results go to `benchmarks/results/` after each process; what is there already,
from the same code, versions, machine and options, is not measured again.

Keras is imported inside functions only: each worker has a backend of its own,
and the process that starts them has none.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models import build_model
from models import make_data

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BACKENDS = ("jax", "tensorflow", "torch")
MODELS = ("mlp", "cnn", "transformer", "encoder", "lora")
# Models that are measured with one batch size only.
BATCHES = {"encoder": [32], "lora": [32]}
TARGETS = {4: 1.10, 8: 1.15}
STOCK = "stock"
AGAIN = "stock_again"
SHORTEST_TURN = 4
LONGEST_TURN = 10
MEMORY_STEPS = 4
BUSY = 0.05
WORKER_TIMEOUT = 1800
# To be raised when the models or the way of measuring change: results of
# another method are thrown away.
METHOD = 2
MIB = 2**20


# ---- Inside a worker ------------------------------------------------------


class Arm:
    """One compiled model and what its training showed."""

    def __init__(self, model_name, optimizer):
        import keras

        self.model = build_model(model_name)
        # A counter inside a metric shows when Keras traces a step again.
        self.traces = 0

        def accuracy(y, y_pred):
            self.traces += 1
            return keras.metrics.sparse_categorical_accuracy(y, y_pred)

        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(optimizer, loss, metrics=[accuracy])
        self.clock = _make_clock()

    def train(self, x, y, batch):
        """The seconds of every step of one `fit`.

        Time is taken around single steps inside `fit`, which is what a user
        runs. Around the whole of `fit`, its own start (tens of milliseconds)
        would hide the method; `train_on_batch` copies the state in and out
        at every step on JAX.
        """
        self.clock.seconds = []
        self.model.fit(
            x,
            y,
            batch_size=batch,
            shuffle=False,
            verbose=0,
            callbacks=[self.clock],
        )
        return self.clock.seconds


def make_optimizer(arm):
    import keras

    import keras_stab

    optimizer = keras.optimizers.AdamW(1e-3)
    if arm in (STOCK, AGAIN):
        return optimizer
    return keras_stab.GRAIN(optimizer, groups=groups_of(arm))


def _make_clock():
    import keras

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.begun = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            # Reading the loss waits for the step: it is an output of the
            # compiled step, and on PyTorch the last operation of the stream.
            float(logs["loss"])
            self.seconds.append(time.perf_counter() - self.begun)

    return Clock()


def measure_time(options):
    """The worker for one backend, model and batch: all arms in turns."""
    names = arm_names(options["groups"])
    model, batch = options["model"], options["batch"]
    x, y = make_data(model, (LONGEST_TURN + 1) * batch)
    arms, first_steps, warm_steps = {}, {}, {}
    for name in names:
        arms[name] = Arm(model, make_optimizer(name))
        begun = time.perf_counter()
        arms[name].train(x[:batch], y[:batch], batch)
        first_steps[name] = time.perf_counter() - begun
    for name in names:
        warm = arms[name].train(x[: 4 * batch], y[: 4 * batch], batch)
        warm_steps[name] = statistics.median(warm[1:])
    turn, turns = plan(
        sum(warm_steps.values()),
        options["steps"],
        options["repeats"],
        options["seconds"],
    )
    rows = (turn + 1) * batch
    traced = sum(arm.traces for arm in arms.values())
    company = Company()
    times = {name: [[] for _ in range(options["repeats"])] for name in names}
    for repeat in range(options["repeats"]):
        # The plan rests on a few warm steps and may be far off.
        deadline = time.monotonic() + 1.5 * (
            options["seconds"] / options["repeats"]
        )
        for i in range(turns):
            if i > 0 and time.monotonic() > deadline:
                break
            shift = (repeat * turns + i) % len(names)
            for name in names[shift:] + names[:shift]:
                # Leftovers of one arm should not be collected at the expense
                # of the next.
                gc.collect()
                seconds = arms[name].train(x[:rows], y[:rows], batch)
                # The first step of `fit` also starts the input pipeline and
                # on JAX takes the state over.
                times[name][repeat] += seconds[1:]
    traced = sum(arm.traces for arm in arms.values()) - traced
    answer = {
        "weights": arms[STOCK].model.count_params(),
        "steps": sum(len(repeat) for repeat in times[STOCK]),
        "steps_a_turn": turn,
        "arms": summarise(times),
        "company": company.share(),
    }
    for name in names:
        answer["arms"][name]["first_step_seconds"] = first_steps[name]
        if name not in (STOCK, AGAIN):
            engine = arms[name].model.optimizer.plan().engine
            answer["arms"][name]["engine"] = engine
    if options["backend"] != "torch":
        answer["traced_again"] = traced > 0
    return answer


class Company:
    """The share of the processor that other processes take meanwhile."""

    def __init__(self):
        self._begun = self._read()

    def share(self):
        """From 0 to 1, or `None` where the system does not tell."""
        if self._begun is None:
            return None
        others, total = (b - a for a, b in zip(self._begun, self._read()))
        return max(0.0, others / total) if total > 0 else 0.0

    def _read(self):
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        ticks = [int(word) for word in line.split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        idle = (ticks[3] + ticks[4]) / second
        total = sum(ticks) / second
        return total - idle - time.process_time(), total


def measure_memory(options):
    """The worker for one arm: the peak of a process is that of one arm."""
    batch = options["batch"]
    x, y = make_data(options["model"], MEMORY_STEPS * batch)
    arm = Arm(options["model"], make_optimizer(options["arm"]))
    read_peak = _device_peak(options["backend"])
    arm.train(x, y, batch)
    if read_peak is not None:
        return {"kind": "device", "process": read_peak() / MIB}
    process = _peak_resident()
    answer = {"kind": "resident", "process": process / MIB}
    # Compiling takes more memory than a small step does, so the peak of the
    # steps is taken apart, from the level to which the process sinks again.
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return answer
    settled = _peak_resident()
    arm.train(x, y, batch)
    answer["steps"] = (_peak_resident() - settled) / MIB
    return answer


def _peak_resident():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_peak(backend):
    """What reads the accelerator's peak, or `None` without accelerator."""
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated
    elif backend == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            return lambda: device.memory_stats()["peak_bytes_in_use"]
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            info = tf.config.experimental.get_memory_info
            return lambda: info("GPU:0")["peak"]
    return None


def probe(options):
    """What a backend runs on, or an error when it is not installed."""
    backend = options["backend"]
    device = None
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
    elif backend == "jax":
        import jax

        if jax.devices()[0].platform != "cpu":
            device = jax.devices()[0].device_kind
    else:
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU")[:1]:
            details = tf.config.experimental.get_device_details(gpu)
            device = details.get("device_name", "gpu")
    return {"device": device or "cpu", "versions": _versions()}


def _versions():
    import keras
    import numpy

    backend = keras.backend.backend()
    names = {"jax": ("jax", "jaxlib")}.get(backend, (backend,))
    versions = {
        "python": platform.python_version(),
        "keras": keras.__version__,
        "numpy": numpy.__version__,
    }
    for name in names:
        versions[name] = importlib.import_module(name).__version__
    return versions


# ---- Numbers --------------------------------------------------------------


def arm_names(groups):
    return [STOCK, AGAIN] + [f"grain_{k}" for k in groups]


def groups_of(arm):
    return int(arm.removeprefix("grain_"))


def plan(seconds_a_step, steps, repeats, seconds):
    """Steps in a turn and turns in a repeat, within the time allowed.

    Args:
        seconds_a_step: One step of every arm, together.
        steps: Timed steps wanted in a repeat, for each arm.
        repeats: Number of repeats.
        seconds: Time allowed for all repeats.
    """
    affordable = seconds / repeats / seconds_a_step
    # One more step in each turn is run but not counted. Two turns or more in
    # a repeat, if they need not be too short for that.
    turn = max(SHORTEST_TURN, int(affordable / 2) - 1)
    turn = min(turn, LONGEST_TURN, steps)
    turns = min(math.ceil(steps / turn), int(affordable / (turn + 1)))
    return turn, max(1, turns)


def summarise(times):
    """Medians and their ratios to the stock step.

    Args:
        times: For each arm a list of repeats, each a list of seconds per step.

    Returns:
        For each arm a dict: `milliseconds`, the median of all steps;
        `ratios`, one a repeat; `ratio`, their median; `lowest` and `highest`.
    """
    answer = {}
    stock = [statistics.median(repeat) for repeat in times[STOCK]]
    for arm, repeats in times.items():
        medians = [statistics.median(repeat) for repeat in repeats]
        ratios = [own / base for own, base in zip(medians, stock)]
        every = [seconds for repeat in repeats for seconds in repeat]
        answer[arm] = {
            "milliseconds": 1e3 * statistics.median(every),
            "ratios": ratios,
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return answer


def target_of(entry, groups):
    """The ratio that is hoped for, or `None`."""
    if groups == entry["batch"]:
        return 2.0
    if groups not in TARGETS:
        return None
    if entry["model"] == "mlp":
        return 1.35 if entry["backend"] == "tensorflow" else 1.25
    if entry["model"] == "encoder" and entry["backend"] == "torch":
        return 1.15
    return 1.10 if entry["model"] == "lora" else TARGETS[groups]


def missed_targets(entries):
    """`(entry, K, ratio, target)` of every ratio above its target."""
    missed = []
    for entry in entries:
        for arm, figures in entry.get("arms", {}).items():
            if arm in (STOCK, AGAIN):
                continue
            target = target_of(entry, groups_of(arm))
            if target is not None and figures["ratio"] > target:
                missed.append((entry, groups_of(arm), figures["ratio"], target))
    return missed


# ---- The file of results --------------------------------------------------


def key(entry):
    return entry["backend"], entry["model"], entry["batch"]


def find_entry(results, combination):
    """The entry of `(backend, model, batch)`, or `None`."""
    for entry in results["entries"]:
        if key(entry) == tuple(combination):
            return entry
    return None


def needs_time(results, combination, settings):
    """Whether a combination is yet to be timed with these settings."""
    entry = find_entry(results, combination)
    return (
        entry is None
        or "arms" not in entry
        or entry.get("settings") != settings
    )


def needs_memory(results, combination, arm, settings):
    """Whether the memory of an arm is yet to be measured."""
    entry = find_entry(results, combination)
    if entry is None or entry.get("settings") != settings:
        return True
    return "process" not in entry.get("memory", {}).get(arm, {})


def errors(entry):
    """What went wrong with the workers of an entry."""
    parts = [entry, *entry.get("memory", {}).values()]
    return [part["error"] for part in parts if "error" in part]


def put_entry(results, entry):
    """Adds an entry in place of the one of the same combination."""
    results["entries"] = [
        e for e in results["entries"] if key(e) != key(entry)
    ] + [entry]
    results["entries"].sort(
        key=lambda e: (
            BACKENDS.index(e["backend"]),
            MODELS.index(e["model"]),
            e["batch"],
        )
    )


def write(results, path, render=None):
    """Writes the JSON and the Markdown; never leaves half a file."""
    render = render or to_markdown
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps(results, indent=1) + "\n"),
        (path.with_suffix(".md"), render(results)),
    ):
        draft = target.with_name(target.name + ".draft")
        draft.write_text(text)
        draft.replace(target)


def current(entries, settings):
    """The entries that this code measured on this machine."""
    same = ("method", "source", "processor", "cores")
    return [
        entry
        for entry in entries
        if all(entry["settings"].get(n) == settings[n] for n in same)
    ]


def source_digest(folder=ROOT / "keras_stab"):
    """Changes with the code of the library, but not with its comments."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("**/*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(ast.dump(ast.parse(path.read_text())).encode())
    return digest.hexdigest()[:16]


# ---- Markdown -------------------------------------------------------------


def to_markdown(results):
    entries = results["entries"]
    lines = ["# Time and memory of a GRAIN step", ""]
    lines += [_machine_line(results["machine"]), ""]
    lines += [*_how_measured(), ""]
    lines += _warnings(entries)
    lines += [*_verdict(entries), ""]
    for backend in BACKENDS:
        own = [e for e in entries if e["backend"] == backend]
        if own:
            lines += [f"## {backend}", "", _versions_line(own), ""]
            lines += [*_table(own), ""]
    return "\n".join(lines)


def _machine_line(machine):
    return (
        f"Measured on {machine['device']} ({machine['processor']}, "
        f"{machine['cores']} cores, {machine['system']}) on "
        f"{machine['date']} by `python benchmarks/step_time.py`; every figure "
        "is in the JSON file beside this one."
    )


def _versions_line(entries):
    lines = {
        ", ".join(
            f"{name} {v}" for name, v in e["settings"]["versions"].items()
        )
        for e in entries
    }
    return "; ".join(sorted(lines)) + "."


def _how_measured():
    return [
        "How to read it. A ratio is the median time of a GRAIN step over that "
        "of a stock step, both with AdamW and equal first weights, the two "
        "taking turns in one process inside `fit`; it is the median of the "
        "repeats, with the lowest and highest repeat in brackets. *Noise* is "
        "a second stock model over the first: a ratio is known no better than "
        "that differs from 1. *Steps* is the number of timed steps of each "
        "model; slow ones make fewer. The target is "
        + ", ".join(f"{t:.2f} for K = {k}" for k, t in TARGETS.items())
        + "; of the perceptron 1.25 (1.35 on TensorFlow), of the encoder on "
        "torch 1.15, of low-rank adapters 1.10, with one row per group 2. The "
        "engine that was chosen stands beside each ratio.",
        "",
        "*First step* is the time of a first `fit` of one step, tracing and "
        "compiling included. *Memory* is the peak of a process of its own: on "
        "an accelerator the backend's own figure for the device; on a CPU the "
        "resident memory that the steps need on top of the settled process, "
        "in brackets the peak of the whole process with imports and "
        "compilation. The first of the two is a lower bound, and next to "
        "nothing on TensorFlow, whose allocator keeps what it once had. GRAIN "
        "holds K gradients for a moment, 4 K bytes per weight.",
    ]


def _warnings(entries):
    lines = []
    busy = max((e.get("company") or 0.0 for e in entries), default=0.0)
    if busy > BUSY:
        lines += [
            f"**The machine was busy:** other processes took up to {busy:.0%} "
            "of the processor. These figures cannot be relied on; measure "
            "again on a quiet machine.",
            "",
        ]
    for entry in entries:
        if entry.get("traced_again"):
            lines += [
                "**Keras traced a step again while it was timed:** "
                f"{' '.join(map(str, key(entry)))}.",
                "",
            ]
    return lines


def _verdict(entries):
    measured = [
        arm
        for entry in entries
        for arm in entry.get("arms", {})
        if arm not in (STOCK, AGAIN) and groups_of(arm) in TARGETS
    ]
    missed = missed_targets(entries)
    if not measured:
        return ["Nothing was timed yet."]
    if not missed:
        return [f"All {len(measured)} ratios are within their target."]
    lines = [
        f"**{len(missed)} of {len(measured)} ratios are above their target:**",
        "",
    ]
    for entry, groups, ratio, target in missed:
        lines.append(
            f"- {entry['backend']}, {entry['model']}, batch {entry['batch']}, "
            f"K = {groups}: {ratio:.2f}, missed the target of {target:.2f}"
        )
    return lines


def _table(entries):
    groups = sorted(
        {
            groups_of(arm)
            for entry in entries
            for arm in entry.get("arms", {})
            if arm not in (STOCK, AGAIN)
        }
    )
    arms = [STOCK] + [f"grain_{k}" for k in groups]
    labels = ["stock"] + [f"K = {k}" for k in groups]
    names = " / ".join(labels)
    header = ["Model", "Weights", "Batch", "Steps", "Stock step, ms", "Noise"]
    header += labels[1:] + [f"First step, s: {names}", f"Memory, MiB: {names}"]
    lines = [_row(header), _row(["---"] * len(header))]
    for entry in entries:
        cells = [entry["model"], "", str(entry["batch"])]
        if "arms" in entry:
            figures = entry["arms"]
            cells[1] = f"{entry['weights']:,}"
            cells += [
                str(entry["steps"]),
                f"{figures[STOCK]['milliseconds']:.1f}",
                _ratio(figures[AGAIN]),
            ]
            cells += [_judged(entry, k) for k in groups]
            cells.append(
                " / ".join(
                    f"{figures[arm]['first_step_seconds']:.1f}"
                    for arm in arms
                    if arm in figures
                )
            )
        else:
            cells += ["failed"] + ["-"] * (len(header) - 5)
        memory = entry.get("memory", {})
        cells.append(" / ".join(_memory(memory.get(arm)) for arm in arms))
        lines.append(_row(cells))
    return lines


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _ratio(figures):
    return (
        f"{figures['ratio']:.2f} "
        f"({figures['lowest']:.2f} to {figures['highest']:.2f})"
    )


def _judged(entry, groups):
    figures = entry["arms"].get(f"grain_{groups}")
    if figures is None:
        return "-"
    engine = figures.get("engine", "").replace("_", " ")
    text = f"{_ratio(figures)} {engine}".rstrip()
    target = target_of(entry, groups)
    if target is None:
        return text
    verdict = "**missed**" if figures["ratio"] > target else "met"
    return f"{text}, {verdict}"


def _memory(figures):
    if figures is None:
        return "-"
    if "error" in figures:
        return "failed"
    if "steps" not in figures:
        return f"{figures['process']:.0f}"
    return f"{figures['steps']:.0f} ({figures['process']:.0f})"


# ---- The parent -----------------------------------------------------------


def run_worker(task, options, script=__file__):
    """Runs one task in a fresh process; returns its answer or an error."""
    environment = dict(os.environ)
    environment["KERAS_BACKEND"] = options["backend"]
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if task == "memory":
        # The C library then returns a freed tensor at once. What it keeps
        # would be there already when the steps that are measured begin, and
        # hide what they need.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, str(script), "--worker", task]
        command += [json.dumps(options), str(answer)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=WORKER_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {WORKER_TIMEOUT} seconds"}
        if done.returncode == 0 and answer.exists():
            return json.loads(answer.read_text())
        return {"error": done.stderr[-2000:] or f"exit {done.returncode}"}


def answers(script, backends, options):
    """What a script measures with each backend, one after the other."""
    for backend in backends:
        print(f"{backend} ...", flush=True)
        answer = run_worker("measure", {"backend": backend, **options}, script)
        if "error" in answer:
            raise SystemExit(f"{backend} failed: {answer['error']}")
        yield backend, answer


def run_script(measure, main):
    """What a script does that calls `answers`: measure there, or `main`."""
    if sys.argv[1:2] == ["--worker"]:
        _, _, _, options, answer = sys.argv
        Path(answer).write_text(json.dumps(measure(json.loads(options))))
    else:
        main()


def run_here(task, options, answer):
    tasks = {"time": measure_time, "memory": measure_memory, "probe": probe}
    Path(answer).write_text(json.dumps(tasks[task](json.loads(options))))


def main(arguments=None):
    options = parse(arguments)
    probes = probe_all(options.backends)
    if not probes:
        raise SystemExit("None of the backends is installed")
    devices = [probed["device"] for probed in probes.values()]
    device = next((d for d in devices if d != "cpu"), "cpu")
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    suffix = "_quick" if options.quick else ""
    path = options.output or RESULTS / f"step_time_{slug}{suffix}.json"
    machine = describe_machine(device)
    results = {"machine": machine, "entries": []}
    settings = {
        "steps": options.steps,
        "repeats": options.repeats,
        "seconds": options.seconds,
        "groups": options.groups,
        "method": METHOD,
        "source": source_digest(),
        "processor": machine["processor"],
        "cores": machine["cores"],
    }
    if path.exists() and not options.fresh:
        found = json.loads(path.read_text())["entries"]
        results["entries"] = current(found, settings)
        dropped = len(found) - len(results["entries"])
        if dropped:
            print(f"Thrown away: {dropped} results of other code or machines")
    plans = {
        (backend, model, batch): {
            **settings,
            "device": probed["device"],
            "versions": probed["versions"],
        }
        for backend, probed in probes.items()
        for model in options.models
        for batch in BATCHES.get(model, options.batches)
    }
    # A worker must not outlive an interrupted benchmark and disturb the next.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measure(results, path, plans)
    write(results, path)
    print(f"\nWritten: {path} and {path.with_suffix('.md').name}")
    failures = [
        f"{' '.join(map(str, key(entry)))}: {error.strip()[-300:]}"
        for entry in results["entries"]
        for error in errors(entry)
    ]
    for failure in failures:
        print(f"Failed: {failure}")
    return 1 if failures else 0


def measure(results, path, plans):
    """Runs what is missing, first all times, then all memory.

    Args:
        results: What is there already; changed in place.
        path: Where the results are written after every worker.
        plans: The settings of each `(backend, model, batch)`.
    """
    from rich import progress

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    ) as bar:
        task = bar.add_task("time", total=len(plans))
        for combination, settings in plans.items():
            if needs_time(results, combination, settings):
                label = " ".join(map(str, combination))
                bar.update(task, description=f"time: {label}")
                options = worker_options(combination, settings)
                entry = dict(zip(("backend", "model", "batch"), combination))
                entry["settings"] = settings
                failed = find_entry(results, combination)
                if failed is not None and failed["settings"] == settings:
                    entry["memory"] = failed.get("memory", {})
                entry.update(run_worker("time", options))
                put_entry(results, entry)
                write(results, path)
            bar.advance(task)
        bar.update(task, description="time")

        memories = {
            (combination, arm): settings
            for combination, settings in plans.items()
            for arm in arm_names(settings["groups"])
            if arm != AGAIN
        }
        task = bar.add_task("memory", total=len(memories))
        # Memory does not mind company on the processor; an accelerator is
        # not shared, since some backends reserve all of its memory.
        alone = any(plan["device"] != "cpu" for plan in plans.values())
        with _pool(1 if alone else min(4, cores())) as pool:
            jobs = {}
            for (combination, arm), settings in memories.items():
                if needs_memory(results, combination, arm, settings):
                    options = worker_options(combination, settings)
                    options["arm"] = arm
                    job = pool.submit(run_worker, "memory", options)
                    jobs[job] = combination, arm
            bar.advance(task, len(memories) - len(jobs))
            for job in concurrent.futures.as_completed(jobs):
                combination, arm = jobs[job]
                entry = find_entry(results, combination)
                entry.setdefault("memory", {})[arm] = job.result()
                write(results, path)
                bar.advance(task)


@contextlib.contextmanager
def _pool(workers):
    """Threads that, when interrupted, do not start what is left to do."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def worker_options(combination, settings):
    backend, model, batch = combination
    return {**settings, "backend": backend, "model": model, "batch": batch}


def probe_all(backends):
    """Device and versions of each backend that is installed."""
    probes = {}
    for backend in backends:
        answer = run_worker("probe", {"backend": backend})
        if "error" in answer:
            reason = answer["error"].strip().splitlines()[-1]
            print(f"Left out: {backend} ({reason})")
        else:
            probes[backend] = answer
    return probes


def describe_machine(device):
    processor = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        processor = re.search(r"model name\s*:\s*(.*)", text).group(1)
    except (OSError, AttributeError):
        pass  # not on Linux, or a processor without a name
    return {
        "device": device,
        "processor": processor,
        "cores": cores(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--batches", nargs="+", type=int, default=[64, 256])
    add("--groups", nargs="+", type=int, default=[4, 8], help="K")
    add("--steps", type=int, default=200, help="in a repeat, for each arm")
    add("--repeats", type=int, default=3)
    add(
        "--seconds",
        type=float,
        default=80.0,
        help="timed seconds allowed for each backend, model and batch;\n"
        "slow ones make fewer steps, and the results say how many",
    )
    add("--quick", action="store_true", help="few steps, batch 64 only")
    add("--output", type=Path, help="path of the JSON file")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        default=True,
        help="skip what the results hold already (the default)",
    )
    again.add_argument(
        "--fresh", action="store_true", help="measure everything again"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps = min(options.steps, 8)
        options.repeats = min(options.repeats, 2)
        options.seconds = min(options.seconds, 10.0)
        options.batches = options.batches[:1]
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_here(*sys.argv[2:])
    else:
        sys.exit(main())
