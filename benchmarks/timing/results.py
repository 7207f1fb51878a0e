"""The file of results: what is there, what is missing, and writing it."""

import ast
import functools
import hashlib
import json

from timing.arms import ALL_WORKLOADS
from timing.workers import BACKENDS
from timing.workers import ROOT

RESULTS = ROOT / "benchmarks" / "results"
# To be raised when the models or the way of measuring change: results of
# another method are thrown away.
METHOD = 4
KINDS = ("time", "compiled", "memory", "solver")


def make_jobs(workloads, backends, threads, kinds=KINDS):
    """What is to be measured, one process each.

    Returns:
        List of dicts of `kind`, `backend` and what that kind needs:
        `workload`, `threads`, `arm`.
    """
    jobs = []
    for backend in backends:
        for workload in workloads:
            named = {"backend": backend, "workload": workload.name}
            jobs += [
                {"kind": "time", **named, "threads": count}
                for count in threads
                if count == 1 or workload.all_threads
            ]
            jobs += [
                {"kind": "memory", **named, "arm": arm}
                for arm in workload.memory
            ]
            if backend == "torch":
                jobs += [
                    {"kind": "compiled", **named, "arm": arm}
                    for arm in workload.compiled
                ]
    jobs += [{"kind": "solver", "backend": b} for b in backends[:1]]
    jobs = [job for job in jobs if job["kind"] in kinds]
    return sorted(jobs, key=_order)


# Seconds of a job: a start with its imports, and what an arm takes to trace
# and compile, of a small model; a method takes a few times as long.
_START = {"torch": 6, "tensorflow": 12, "jax": 6}
_COMPILED = {"torch": 0.1, "tensorflow": 2.5, "jax": 2.5}
_OTHERS = {"compiled": 60, "memory": 20, "solver": 10}


def expected_seconds(job, seconds):
    """How long a job may take, roughly, to be told before it begins.

    Args:
        job: As in `make_jobs`.
        seconds: Those that timed steps take, times as long as usual.
    """
    if job["kind"] != "time":
        return _OTHERS[job["kind"]]
    workload = next(w for w in ALL_WORKLOADS if w.name == job["workload"])
    count = len(workload.all_arms(job["threads"]))
    share = 1 if job["threads"] == 1 else 0.5
    return (
        _START[job["backend"]]
        + count * (1 + _COMPILED[job["backend"]])
        + share * seconds * workload.seconds
    )


def _order(job):
    names = [workload.name for workload in ALL_WORKLOADS]
    return (
        KINDS.index(job["kind"]),
        BACKENDS.index(job["backend"]),
        names.index(job["workload"]) if "workload" in job else -1,
        job.get("threads") == "all",
    )


def find(entries, **job):
    """The entry of a job, or `None`."""
    return next((e for e in entries if e["job"] == job), None)


def is_missing(results, job, settings):
    """Whether a job is yet to be done with these settings."""
    entry = find(results["entries"], **job)
    if entry is None or entry["settings"] != settings:
        return True
    # That something does not compile is a result.
    return "error" in entry and job["kind"] != "compiled"


def put(results, job, settings, answer):
    """Adds an entry in place of the one of the same job."""
    entries = [e for e in results["entries"] if e["job"] != job]
    entries.append({"job": job, "settings": settings, **answer})
    results["entries"] = sorted(entries, key=lambda e: _order(e["job"]))


def failures(results):
    """A line for everything that went wrong and should not have."""
    return [
        f"{' '.join(map(str, entry['job'].values()))}: "
        f"{part['error'].strip()[-300:]}"
        for entry in results["entries"]
        if entry["job"]["kind"] != "compiled"
        for part in (entry, *entry.get("arms", {}).values())
        if "error" in part
    ]


def current(entries, settings):
    """The entries that this code measured on this machine."""
    same = ("method", "source", "processor", "cores")
    return [
        entry
        for entry in entries
        if all(entry["settings"].get(n) == settings[n] for n in same)
    ]


def write(results, path, render):
    """Writes the JSON and the Markdown; never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps(results, indent=1) + "\n"),
        (path.with_suffix(".md"), render(results)),
    ):
        draft = target.with_name(target.name + ".draft")
        draft.write_text(text)
        draft.replace(target)


# Parts of the library that no train step runs.
_NOT_TIMED = ("callbacks", "diagnostics", "games", "__main__.py")
# Who imports which family of methods, by the beginnings of arms' names.
_FAMILIES = {
    "averaging": ("mean", "ema", "schedule_free"),
    "flatness": ("sam", "ire"),
    "interpolation": (
        "lookahead",
        "optimistic",
        "past",
        "extragradient",
        "rapp",
        "cegplus",
    ),
    "layerwise": ("lamb", "lars", "tvlars", "sam", "ire"),
}


def source_of(job):
    """The `source_digest` of what a job may run."""
    arms = [job["arm"]] if "arm" in job else []
    if job["kind"] == "time":
        named = [w for w in ALL_WORKLOADS if w.name == job["workload"]]
        arms = [arm for w in named for arm in w.arms]
    without = [
        f"optimizers/{family}"
        for family, names in _FAMILIES.items()
        if not any(arm.startswith(names) for arm in arms)
    ]
    return source_digest(without=(*_NOT_TIMED, *without))


@functools.cache
def source_digest(folder=ROOT / "keras_stab", without=()):
    """Changes with the code of the library, but not with its comments.

    Args:
        folder: Where the code is.
        without: Folders and files in it that are left out.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("**/*.py")):
        if path.relative_to(folder).as_posix().startswith(without or ("//",)):
            continue
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(ast.dump(ast.parse(path.read_text())).encode())
    return digest.hexdigest()[:16]
