"""Starts processes that measure, each with a backend of its own."""

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BACKENDS = ("torch", "tensorflow", "jax")
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900


def run_worker(task, options, script):
    """Runs one task of a script in a fresh process.

    Returns:
        Its answer, or a dict with `error`.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, str(script), "--worker", task]
        command += [json.dumps(options), str(answer)]
        seconds = options.get("timeout", TIMEOUT)
        try:
            done = subprocess.run(
                command,
                env=_environment(task, options, folder),
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {seconds} seconds"}
        if done.returncode == 0 and answer.exists():
            return json.loads(answer.read_text())
        return {"error": done.stderr[-2000:] or f"exit {done.returncode}"}


def _environment(task, options, folder):
    environment = dict(os.environ)
    environment["KERAS_BACKEND"] = options["backend"]
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    if options.get("threads") == 1:
        environment["OMP_NUM_THREADS"] = "1"
        environment["TF_NUM_INTRAOP_THREADS"] = "1"
        environment["TF_NUM_INTEROP_THREADS"] = "1"
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = (
            f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
        )
    if task == "compiled":
        # Seconds to compile are not those of a cache that is filled already.
        environment["TORCHINDUCTOR_CACHE_DIR"] = folder
    if task == "memory":
        # The C library then returns a freed tensor at once. What it keeps
        # would be there already when the steps that are measured begin, and
        # hide what they need.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    return environment


def keep_to_threads(task, options):
    """Inside a worker: one thread also means one core, if it is alone."""
    alone = options.get("threads") == 1 and task != "compiled"
    if alone and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def answers(script, backends, options):
    """What a script measures with each backend, one after the other."""
    for backend in backends:
        print(f"{backend} ...", flush=True)
        answer = run_worker("measure", {"backend": backend, **options}, script)
        if "error" in answer:
            raise SystemExit(f"{backend} failed: {answer['error']}")
        yield backend, answer


def run_script(tasks, main):
    """What a script does: one of its tasks in a worker, or `main`.

    Args:
        tasks: Functions from options to an answer, by name.
        main: Function whose result is the exit status.
    """
    if sys.argv[1:2] != ["--worker"]:
        sys.exit(main())
    _, _, task, options, answer = sys.argv
    options = json.loads(options)
    keep_to_threads(task, options)
    Path(answer).write_text(json.dumps(tasks[task](options)))


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
    return {"device": device or "cpu", "versions": versions()}


def versions():
    import keras
    import numpy

    backend = keras.backend.backend()
    names = {"jax": ("jax", "jaxlib")}.get(backend, (backend,))
    found = {
        "python": platform.python_version(),
        "keras": keras.__version__,
        "numpy": numpy.__version__,
    }
    for name in names:
        found[name] = importlib.import_module(name).__version__
    return found


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
