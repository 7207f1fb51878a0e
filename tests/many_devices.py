"""The table of `guides/many_devices.md`: every method on several devices.

    python tests/many_devices.py

Trains each method on one device and with every engine, 20 steps, and writes
what came of it between the marks of the page; `make support` runs it. Takes
some minutes.
"""

import argparse
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "guides" / "many_devices.md"
WORKER = ROOT / "tests" / "workers" / "every_method.py"
BACKENDS = ("jax", "tensorflow", "torch")
LARGEST = 1e-5
SECONDS = 900
MARKS = "<!-- methods -->", "<!-- end of methods -->"
# Rows of the contract table that are no methods of ours.
HELPERS = ("Transparent", "AskingNothing")


def methods():
    """Rows of the table, sorted."""
    import contract

    rows = [
        row.name
        for row in contract.ROWS
        if not row.nested and row.name not in HELPERS
    ]
    return sorted({*rows, "GRAIN-replicas"})


def outcomes(backend, *names):
    """What each engine of a backend made of each method."""
    ranks = 2 if backend == "torch" else 1
    loopback = [n for _, n in socket.if_nameindex() if n.startswith("lo")][0]
    flags = "--xla_force_host_platform_device_count=4"
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
        # Compiling takes most of the time of so small a model.
        "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
        "GLOO_SOCKET_IFNAME": loopback,
    }
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen(
                [sys.executable, str(WORKER), folder, str(rank), *names],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            found = [w.communicate(timeout=SECONDS) for w in workers]
        finally:
            for worker in workers:
                worker.kill()  # it has ended, unless the time was up
    for worker, (_, errors) in zip(workers, found):
        if worker.returncode:
            raise SystemExit(f"{backend} failed: {errors[-3000:]}")
    return json.loads(found[0][0].splitlines()[-1])


def cell(outcome):
    """An outcome in the words of the table."""
    if "refused" in outcome:
        return "refused"
    if "warned" in outcome:
        return "apart, warns"
    return "yes" if outcome["difference"] <= LARGEST else "**differs**"


def table(found):
    """Of the outcomes by engine and method."""
    lines = [["method", *found], ["---"] * (1 + len(found))]
    for name in sorted({name for cells in found.values() for name in cells}):
        cells = [cell(outcomes[name]) for outcomes in found.values()]
        lines.append([f"`{name}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells_of(page):
    """The table that a page has, by engine and method."""
    inside = page.split(MARKS[0])[1].split(MARKS[1])[0]
    lines = [
        [word.strip() for word in line.strip("|").split("|")]
        for line in inside.splitlines()
        if line.startswith("|")
    ]
    engines = lines[0][1:]
    return {
        engine: {name.strip("`"): cells[i] for name, *cells in lines[2:]}
        for i, engine in enumerate(engines)
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    page = parser.parse_args(argv).page
    found = {}
    for backend in BACKENDS:
        print(f"{backend} ...", flush=True)
        found |= outcomes(backend)
    for engine, own in found.items():
        for name, outcome in own.items():
            print(engine, name, json.dumps(outcome)[:160])
    written = f"{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}"
    pattern = f"{MARKS[0]}.*?{MARKS[1]}"
    text = re.sub(pattern, lambda _: written, page.read_text(), flags=re.S)
    page.write_text(text)
    if "**differs**" in text:
        raise SystemExit(f"{page}: some methods differ.")


if __name__ == "__main__":
    main()
