"""benchmarks/method_time.py: its arms, and its numbers on made-up times."""

import sys
from pathlib import Path

import keras
import pytest
from scripts import load_script

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "method_time.py"


@pytest.fixture(scope="module")
def script():
    # As when it is run: its folder is where it imports from.
    sys.path.insert(0, str(SCRIPT.parent))
    return load_script(SCRIPT)


def test_every_arm_has_an_optimizer_of_its_own(script):
    for suite in script.SUITES.values():
        made = {arm: suite.make(arm) for arm in suite.arms}
        for arm, optimizer in made.items():
            assert isinstance(optimizer, keras.optimizers.Optimizer)
            ours = type(optimizer).__module__.startswith("keras_stab")
            plain = (script.step_time.STOCK, script.step_time.AGAIN)
            assert ours != (arm in (*plain, *suite.bases.values()))
        configurations = {
            str(optimizer.get_config())
            for arm, optimizer in made.items()
            if arm != script.step_time.AGAIN
        }
        assert len(configurations) == len(made) - 1
        named = {*suite.targets, *suite.bases, *suite.cycles}
        assert named <= set(suite.arms)


def test_kinds_of_steps_are_weighted(script):
    suite = script.SUITES["averaging"]
    stock, again = script.step_time.STOCK, script.step_time.AGAIN
    times = {
        stock: [[1.0] * 9, [1.0]],
        again: [[2.0] * 9, [2.0]],
        "mean_tenth": [[1.0] * 9, [3.0]],
    }
    found = script.summarise(times, suite)
    assert found[again]["ratio"] == pytest.approx(2.0)
    assert found["mean_tenth"]["ratio"] == pytest.approx(1.2)


def test_places_in_a_cycle_count_alike_and_bases_differ(script):
    suite = script.SUITES["interpolation"]
    times = {
        script.step_time.STOCK: [[4.0] * 9, [4.0]],
        "sgd": [[2.0] * 9, [2.0]],
        "rapp": [[2.0] * 7, [2.0] * 7, [5.0] * 7],
    }
    found = script.summarise(times, suite)
    assert found["rapp"]["ratio"] == pytest.approx(1.5)
    assert suite.kind("rapp", 5) == 2
    assert suite.kind("sgd", 20) == 1
