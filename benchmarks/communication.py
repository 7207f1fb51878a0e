"""Counts what devices send each other in a train step.

    python benchmarks/communication.py

JAX: the program that XLA compiled. PyTorch and TensorFlow: what is handed to
their collectives. Four devices of one processor, the loopback address only.
Writes `results/communication.md` and `.json`, and the tables of
`guides/many_devices.md`; takes a few minutes. The table
of a large model is computed on paper and its formulas are held against what
was counted; see `--help`.
"""

import argparse
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from traffic import cases
from traffic import scale
from traffic import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "communication.json"
GUIDE = ROOT / "guides" / "many_devices.md"
SECONDS = 900


def count(backend, only):
    """What a backend's steps send, by model and arm; in other processes."""
    ranks = cases.DEVICES if backend == "torch" else 1
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__)), "--worker", backend]
                + [str(rank), folder, json.dumps(only)],
                env=_environment(backend),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            errors = [w.communicate(timeout=SECONDS)[1] for w in workers]
        finally:
            for worker in workers:
                worker.kill()  # it has ended, unless the time was up
        answers = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        if not all(answer.exists() for answer in answers):
            raise SystemExit(f"{backend} failed: {errors[0][-3000:]}")
        return json.loads(answers[0].read_text())


def _environment(backend):
    loopback = [n for _, n in socket.if_nameindex() if n.startswith("lo")][0]
    flags = os.environ.get("XLA_FLAGS", "")
    devices = f"--xla_force_host_platform_device_count={cases.DEVICES}"
    return {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} {devices}".strip(),
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            p for p in (os.environ.get("PYTHONPATH", ""), str(ROOT)) if p
        ),
    }


def work(backend, rank, folder, only):
    """One worker: counts every step and writes the answer."""
    own = importlib.import_module(f"traffic.on_{backend}")
    place = {}
    if backend == "torch":
        import torch.distributed

        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting",
            rank=rank,
            world_size=cases.DEVICES,
        )
        place = {"rank": rank}
    answer = {}
    for model in cases.MODELS:
        entries = answer.setdefault(model.name, {})
        for arm in cases.ARMS:
            if only and arm.name not in only:
                continue
            try:
                entries[arm.name] = own.measure(model, arm, **place)
            except (ValueError, RuntimeError) as error:
                entries[arm.name] = {"error": str(error)[:300]}
    if backend == "jax":
        answer["solver"] = scale.solver_seconds()
    path = Path(folder) / f"{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(answer))
    path.with_suffix(".part").rename(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=[*tables.BACKENDS])
    parser.add_argument("--arms", nargs="+", help="some of the steps only")
    parser.add_argument("--weights", type=float, default=7e9)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument(
        "--gigabytes", type=float, default=50, help="a second, off one device"
    )
    parser.add_argument("--bytes", type=int, default=4, help="of a number")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--before", type=Path, help="results of older code")
    options = parser.parse_args(argv)
    results = {"counts": {}}
    if options.output.exists():  # what is not measured now stays
        results = json.loads(options.output.read_text())
    for backend in options.backends:
        print(f"{backend} ...", flush=True)
        counts = count(backend, options.arms)
        results["solver"] = counts.pop("solver", results.get("solver"))
        for model, entries in counts.items():
            known = results["counts"].setdefault(backend, {})
            known.setdefault(model, {}).update(entries)
    if options.before:
        results["before"] = json.loads(options.before.read_text())["counts"]
    results["paper"] = {
        "weights": options.weights,
        "devices": options.devices,
        "gigabytes": options.gigabytes,
        "width": options.bytes,
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    text = tables.markdown(results)
    options.output.with_suffix(".md").write_text(text)
    if options.output == RESULTS:
        written = tables.for_guide(results).strip()
        pattern = f"{tables.MARKS[0]}.*{tables.MARKS[1]}"
        page = re.sub(pattern, lambda _: written, GUIDE.read_text(), flags=re.S)
        GUIDE.write_text(page)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(
            sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
        )
    else:
        main()
