"""Inside a worker: the peak of memory of one optimizer."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

from models import make_data

from timing.measure import Trained
from timing.measure import make_optimizer

STEPS = 4
MIB = 2**20


def measure_memory(options):
    """The worker for one arm: the peak of a process is that of one arm."""
    batch = options["batch"]
    x, y = make_data(options["model"], STEPS * batch)
    trained = Trained(options["model"], make_optimizer(options["arm"]))
    read_peak = _device_peak(options["backend"])
    trained.train(x, y, batch)
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
    trained.train(x, y, batch)
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
