"""The table of results, to read."""

from timing.arms import ALL_WORKLOADS
from timing.arms import ARMS
from timing.arms import FIRST_STEP_TARGETS
from timing.arms import SOLVER_TARGETS
from timing.arms import STOCK
from timing.arms import target
from timing.company import BUSY
from timing.results import find
from timing.workers import BACKENDS

HOW = """\
How to read it. A ratio is the time of a step over that of the stock optimizer
beside it (*against*), with equal first weights, all taking turns of 20 steps
in one process inside `fit`. Times are first quartiles; of methods that do
more at some steps, the mean over the places of their cycle. *Paired* is the
median over turns of the ratio of mean steps in the same turn. *CPU* is the
time of the process on the processor, *wall* that on the clock. "AdamW again"
is a second copy of the stock optimizer: no ratio is known better than that
one differs from 1. *First step* is the time of a first `fit` of one step,
tracing and compiling included.

*Memory* is the peak of a process of its own: on an accelerator the backend's
own figure for the device; on a CPU the resident memory that the steps need on
top of the settled process, in brackets the peak of the whole process with
imports and compilation. The first of the two is a lower bound, and next to
nothing on TensorFlow, whose allocator keeps what it once had."""


def to_markdown(results):
    entries, machine = results["entries"], results["machine"]
    lines = ["# Time and memory of train steps", ""]
    lines += [
        f"Measured on {machine['device']} ({machine['processor']}, "
        f"{machine['cores']} cores, {machine['system']}) on "
        f"{machine['date']} by `python benchmarks/step_time.py`; every figure "
        "is in the JSON file beside this one.",
        "",
        *warnings(entries),
        *overview(entries),
        *HOW.splitlines(),
        "",
    ]
    for backend in BACKENDS:
        own = [e for e in entries if e["job"]["backend"] == backend]
        timed = [e for e in own if "arms" in e]
        if timed:
            versions = timed[0]["settings"]["versions"]
            text = ", ".join(f"{name} {v}" for name, v in versions.items())
            lines += [f"## {backend}", "", f"{text}.", ""]
            lines += [*details(own, backend), "", *compiled(own)]
    return "\n".join([*lines, *solver(entries)]).rstrip() + "\n"


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _head(cells):
    return [_row(cells), _row(["---"] * len(cells))]


def warnings(entries):
    lines = []
    # Others are started side by side.
    timed = [e for e in entries if e["job"]["kind"] == "time"]
    busy = max((e.get("company") or 0.0 for e in timed), default=0.0)
    if busy > BUSY:
        lines += [
            f"**The machine was busy:** other processes took up to {busy:.0%} "
            "of the processor. Ratios of CPU time suffer less than others.",
            "",
        ]
    for entry in entries:
        name = " ".join(map(str, entry["job"].values()))
        if entry.get("traced_again"):
            lines += [
                f"**Keras traced a step again while it was timed:** {name}.",
                "",
            ]
        if "error" in entry and entry["job"]["kind"] != "compiled":
            line = entry["error"].strip().splitlines()[-1][:200]
            lines += [f"**Failed:** {name}: {line}", ""]
    return lines


def judged(entries, backend, workload, arm):
    """`(ratio, target)` of an arm; either may be `None`.

    The ratio is that of CPU time with one thread, on an accelerator that of
    wall time.
    """
    for threads, kind in ((1, "cpu"), ("all", "wall")):
        entry = find(
            entries,
            kind="time",
            backend=backend,
            workload=workload,
            threads=threads,
        )
        figures = (entry or {}).get("arms", {}).get(arm, {})
        if kind in figures:
            return figures[kind]["ratio"], target(backend, workload, arm)
    return None, None


def _timed_arms(entries, workload):
    found = {
        arm
        for e in entries
        if e["job"].get("workload") == workload and e["job"]["kind"] == "time"
        for arm in e.get("arms", {})
    }
    return [arm for arm in ARMS if arm in found]


def overview(entries):
    """One row for each method and model, one column for each backend."""
    rows, missed, judgements = [], 0, 0
    for workload in (w.name for w in ALL_WORKLOADS):
        for arm in _timed_arms(entries, workload):
            if ARMS[arm].base is None:
                continue
            cells = [workload, ARMS[arm].label, ARMS[ARMS[arm].base].label]
            for backend in BACKENDS:
                ratio, limit = judged(entries, backend, workload, arm)
                judgements += limit is not None
                missed += limit is not None and ratio > limit
                cells.append(_verdict(ratio, limit))
            rows.append(_row(cells))
    if not rows:
        return ["Nothing was timed yet.", ""]
    head = _head(["Model, rows", "Method", "Against", *BACKENDS])
    return [
        "Ratio of CPU time with one thread, and the target where there is one "
        f"(of {judgements} targets {missed} are missed):",
        "",
        *head,
        *rows,
        "",
    ]


def _verdict(ratio, limit):
    if ratio is None:
        return "-"
    if limit is None:
        return f"{ratio:.2f}"
    verdict = "**missed**" if ratio > limit else "met"
    return f"{ratio:.2f} ({limit:.2f}, {verdict})"


def details(entries, backend):
    """All figures of a backend."""
    cells = ["Model, rows", "Method", "steps", "ms, 1 thread", "CPU (paired)"]
    cells += ["wall (paired)", "ms, all threads", "CPU (paired)"]
    cells += ["wall (paired)", "first step, s", "memory, MiB", "engine"]
    lines = _head(cells)
    for workload in (w.name for w in ALL_WORKLOADS):
        named = {"backend": backend, "workload": workload}
        for arm in _timed_arms(entries, workload):
            times = [
                (find(entries, kind="time", **named, threads=t) or {})
                for t in (1, "all")
            ]
            found = [e.get("arms", {}).get(arm, {}) for e in times]
            cells = [workload, ARMS[arm].label, str(found[0].get("steps", "-"))]
            for figures in found:
                cells += _times(figures)
            cells += [
                _first_step(times, backend, workload, arm),
                _memory(find(entries, kind="memory", **named, arm=arm)),
                found[0].get("engine", "").replace("_", " "),
            ]
            lines.append(_row(cells))
    return lines


def _times(figures):
    if "error" in figures:
        return [f"failed: {figures['error'][:80]}", "", ""]
    if "cpu" not in figures:
        return ["-", "-", "-"]
    return [f"{figures['wall']['milliseconds']:.1f}"] + [
        f"{figures[kind]['ratio']:.2f} ({figures[kind]['paired']:.2f})"
        for kind in ("cpu", "wall")
    ]


def _first_step(times, backend, workload, arm):
    """Seconds with one thread and all, and the target where there is one."""
    seconds, ratio = [], None
    for entry in times:
        arms = entry.get("arms", {})
        own = arms.get(arm, {}).get("first_step_seconds")
        if own is not None:
            seconds.append(f"{own:.1f}")
            ratio = own / arms[STOCK]["first_step_seconds"]
    text = " / ".join(seconds) or "-"
    limit = FIRST_STEP_TARGETS.get((workload, arm, backend))
    if ratio is None or limit is None:
        return text
    return f"{text}: {_verdict(ratio, limit)}"


def _memory(entry):
    if entry is None:
        return ""
    if "error" in entry:
        return "failed"
    if "steps" not in entry:
        return f"{entry['process']:.0f}"
    return f"{entry['steps']:.0f} ({entry['process']:.0f})"


def compiled(entries):
    """What `torch.compile` makes of some methods."""
    entries = [e for e in entries if e["job"]["kind"] == "compiled"]
    if not entries:
        return []
    lines = [
        "With `jit_compile=True`, that is `torch.compile` (CPU time, one "
        "thread): against the stock optimizer that is compiled too, and "
        "against the same method without.",
        "",
    ]
    cells = ["Model, rows", "Method", "compiles", "against compiled stock"]
    cells += ["compiled against eager", "first step, s (stock)"]
    lines += _head(cells)
    for entry in entries:
        workload, arm = entry["job"]["workload"], entry["job"]["arm"]
        figures = entry.get("arms", {}).get(arm, entry)
        cells = [workload, ARMS[arm].label]
        if "error" in figures:
            error = figures["error"].strip().splitlines()[-1][:200]
            cells += [f"no: {error}".replace("|", "/"), "", "", ""]
        else:
            arms = entry["arms"]
            speed_up = _over(figures, arms["eager"])
            stock = arms[ARMS[arm].base]["first_step_seconds"]
            reason = figures.get("uncompiled", "").replace("|", "/")
            cells += [
                f"no: {reason}" if reason else "yes",
                f"{figures['cpu']['ratio']:.2f}",
                f"{speed_up:.2f}",
                f"{figures['first_step_seconds']:.0f} ({stock:.0f})",
            ]
        lines.append(_row(cells))
    return [*lines, ""]


def _over(figures, others):
    return figures["cpu"]["milliseconds"] / others["cpu"]["milliseconds"]


def solver(entries):
    entry = next((e for e in entries if "solver" in e), None)
    if entry is None:
        return []
    lines = [
        "## The K x K problem of GRAIN",
        "",
        "`min_norm_weights` of a NumPy matrix, on the host: first quartile of "
        "CPU time, and the largest gap (`residual`).",
        "",
        *_head(["K", "ms", "gap"]),
    ]
    for groups, figures in entry["solver"].items():
        milliseconds = figures["milliseconds"]
        limit = SOLVER_TARGETS[int(groups)]
        cells = [groups, _verdict(milliseconds, limit), f"{figures['gap']:.1e}"]
        lines.append(_row(cells))
    return [*lines, ""]
