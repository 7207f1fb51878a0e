"""guides/many_devices: its table, its code and its script."""

import json
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
# As when the benchmark is run: its folder is where it imports from.
sys.path.insert(0, str(ROOT / "benchmarks"))

from traffic import cases  # noqa: E402
from traffic import scale  # noqa: E402
from traffic import tables  # noqa: E402
from traffic.compiled_program import Program  # noqa: E402

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


def test_figures_are_those_of_the_benchmark():
    """`python benchmarks/communication.py` writes both."""
    found = ROOT / "benchmarks" / "results" / "communication.json"
    results = json.loads(found.read_text())
    assert tables.for_guide(results).strip() in PAGE
    assert tables.markdown(results) == found.with_suffix(".md").read_text()


def test_what_a_compiled_program_sends():
    """A sum in a loop of three, and a product of eight rows."""
    program = Program(
        """
%body (p: f32[4]) -> f32[4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,6]{1,0} parameter(1)
  %c = f32[8,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}
  ROOT %s = (f32[4]{0}, f32[2]{0}) all-reduce(%x, %y), to_apply=%add
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %g = f32[16]{0} all-gather(%w), dimensions={0}
}
"""
    )
    assert program.collectives() == [
        ("all-reduce", 3, 3 * 4 * 6),
        ("all-gather", 1, 4 * 16),
    ]
    assert program.rows_of_products(4, 6) == 24
    assert cases.summary(1, program.collectives())["payload"] == 34


def test_paper_agrees_with_rings():
    """An all-reduce is a reduce-scatter and an all-gather."""
    mean, _ = scale.sent("mean", 4, 1)
    assert scale.sent("aligned", 4, 4)[0] == mean
    assert scale.sent("spread", 4, 8)[0] == mean * 9 / 2
    assert scale.seconds("mean", 7e9, 64, 1, 50e9, 4) == pytest.approx(1.1025)
    assert mean == cases.sent_by_ring("all-reduce", 1, 4)


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
