"""guides/many_devices: its table, its code and its script."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import keras
import many_devices
import pytest

ROOT = Path(__file__).parents[1]
PAGE = many_devices.PAGE.read_text()
BACKEND = keras.backend.backend()


def test_the_table_has_every_method():
    """Run `python tests/many_devices.py` after a change of the methods."""
    cells = many_devices.cells_of(PAGE)
    assert len(cells) == 5
    for engine in cells.values():
        assert sorted(engine) == many_devices.methods()
        assert set(engine.values()) <= {"yes", "refused", "apart, warns"}


@pytest.mark.slow
def test_the_table_is_true():
    cells = many_devices.cells_of(PAGE)
    for engine, outcomes in many_devices.outcomes(BACKEND).items():
        found = {n: many_devices.cell(o) for n, o in outcomes.items()}
        assert found == cells[engine]


def test_outcomes_in_words():
    found = {
        "A": {"x": {"difference": 0.0}, "y": {"difference": 1e-3}},
        "B": {"x": {"refused": "no"}, "y": {"warned": "apart"}},
    }
    text = "\n".join([many_devices.MARKS[0], many_devices.table(found)])
    text += many_devices.MARKS[1]
    assert many_devices.cells_of(text) == {
        "A": {"x": "yes", "y": "**differs**"},
        "B": {"x": "refused", "y": "apart, warns"},
    }


def test_the_code_of_the_guide():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    chosen = blocks[("jax", "tensorflow", "torch").index(BACKEND)]
    names = {}
    try:
        exec(chosen, names)
    finally:
        keras.distribution.set_distribution(None)
    assert names["model"].optimizer.across == "replicas"
    exec(blocks[3], names)
    assert callable(names["train_step"])


def test_the_script():
    """On two processes of PyTorch, on four devices elsewhere."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = 2 if BACKEND == "torch" else 1
    loopback = [n for _, n in socket.if_nameindex() if n.startswith("lo")][0]
    command = [sys.executable, str(ROOT / "guides" / "many_devices.py")]
    processes = [
        subprocess.Popen(
            [*command, "--steps", "2"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "GLOO_SOCKET_IFNAME": loopback,
                "JAX_PLATFORMS": "cpu",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        found = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()  # it has ended, unless the time was up
    for process, (_, errors) in zip(processes, found):
        assert process.returncode == 0, errors[-3000:]
    devices = 2 if BACKEND == "torch" else 4
    assert f"{devices} groups" in found[0][0]
    assert "Largest difference" in found[0][0]
