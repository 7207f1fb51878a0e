"""benchmarks/step_time.py: its numbers and words, on made-up times."""

import copy
import json
import sys
from pathlib import Path

import pytest
from scripts import load_script

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step_time.py"
COMBINATION = ("jax", "mlp", 64)
SETTINGS = {
    "steps": 3,
    "repeats": 3,
    "seconds": 1.0,
    "groups": [4, 8],
    "method": 1,
    "source": "abc",
    "processor": "Abacus",
    "cores": 2,
    "device": "cpu",
    "versions": {"jax": "1.0"},
}
MACHINE = {
    "device": "cpu",
    "processor": "Abacus",
    "cores": 2,
    "system": "Linux",
    "date": "2026-11-21",
}


@pytest.fixture(scope="module")
def script():
    # As when it is run: its folder is where it imports from.
    sys.path.insert(0, str(SCRIPT.parent))
    return load_script(SCRIPT)


@pytest.fixture
def times():
    """Medians of the repeats: stock 10, 10, 20 ms; K = 4 11, 12, 21 ms."""
    return {
        "stock": [[0.010, 0.010, 0.500], [0.009, 0.010, 0.011], [0.020]],
        "stock_again": [[0.010], [0.010], [0.020]],
        "grain_4": [[0.011, 0.011, 0.900], [0.012, 0.011, 0.013], [0.021]],
        "grain_8": [[0.020], [0.012], [0.020]],
    }


@pytest.fixture
def results(script, times):
    entry = dict(zip(("backend", "model", "batch"), COMBINATION))
    entry.update(
        settings=copy.deepcopy(SETTINGS),
        weights=669706,
        steps=7,
        company=0.01,
        traced_again=False,
        arms=script.summarise(times),
        memory={"stock": {"kind": "resident", "process": 900, "steps": 4.2}},
    )
    for figures in entry["arms"].values():
        figures["first_step_seconds"] = 1.5
    return {"machine": MACHINE, "entries": [entry]}


def slow_down(results, arm, ratio):
    results["entries"][0]["arms"][arm]["ratio"] = ratio


# ---- Numbers --------------------------------------------------------------


def test_ratio_is_the_median_over_repeats_of_ratios_of_medians(script, times):
    figures = script.summarise(times)["grain_4"]
    assert figures["ratios"] == pytest.approx([1.1, 1.2, 1.05])
    assert figures["ratio"] == pytest.approx(1.1)
    assert figures["lowest"] == pytest.approx(1.05)
    assert figures["highest"] == pytest.approx(1.2)


def test_milliseconds_are_the_median_of_all_steps(script, times):
    figures = script.summarise(times)
    assert figures["grain_4"]["milliseconds"] == pytest.approx(12.0)
    assert figures["stock"]["milliseconds"] == pytest.approx(10.0)


def test_a_busy_spell_of_all_arms_leaves_the_ratio(script, times):
    before = script.summarise(times)["grain_8"]["ratios"]
    for repeats in times.values():
        repeats[1] = [3 * seconds for seconds in repeats[1]]
    after = script.summarise(times)["grain_8"]["ratios"]
    assert after == pytest.approx(before)


def test_stock_is_its_own_measure(script, times):
    figures = script.summarise(times)
    assert figures["stock"]["ratios"] == [1.0, 1.0, 1.0]
    assert figures["stock_again"]["ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("seconds_a_step", [1e-4, 0.03, 0.4, 3.0, 60.0])
def test_plan_keeps_to_the_time(script, seconds_a_step):
    turn, turns = script.plan(seconds_a_step, 200, 3, 80.0)
    assert turns >= 1
    shortest, longest = script.SHORTEST_TURN, script.LONGEST_TURN
    assert shortest <= turn <= longest
    spent = 3 * turns * (turn + 1) * seconds_a_step
    assert spent <= 80.0 or (turn, turns) == (shortest, 1)
    if seconds_a_step < 0.1:
        assert turn * turns >= 200


def test_plan_makes_no_more_steps_than_wanted(script):
    assert script.plan(1e-4, 3, 1, 80.0) == (3, 1)
    assert script.plan(1e-4, 20, 1, 80.0) == (10, 2)


# ---- Resuming -------------------------------------------------------------


def test_finished_combinations_are_skipped(script, results):
    assert not script.needs_time(results, COMBINATION, SETTINGS)
    assert script.needs_time(results, ("jax", "mlp", 256), SETTINGS)
    assert script.needs_time(results, ("torch", "mlp", 64), SETTINGS)


@pytest.mark.parametrize(
    "change", [{"steps": 4}, {"source": "abd"}, {"versions": {"jax": "1.1"}}]
)
def test_other_settings_are_measured_anew(script, results, change):
    settings = {**SETTINGS, **change}
    assert script.needs_time(results, COMBINATION, settings)
    assert script.needs_memory(results, COMBINATION, "stock", settings)


def test_failures_are_tried_again(script, results):
    (entry,) = results["entries"]
    entry["memory"]["stock"] = {"error": "out of memory"}
    assert script.needs_memory(results, COMBINATION, "stock", SETTINGS)
    del entry["arms"]
    entry["error"] = "no such layer"
    assert script.needs_time(results, COMBINATION, SETTINGS)
    assert script.errors(entry) == ["no such layer", "out of memory"]


def test_memory_is_skipped_arm_by_arm(script, results):
    assert not script.needs_memory(results, COMBINATION, "stock", SETTINGS)
    assert script.needs_memory(results, COMBINATION, "grain_4", SETTINGS)


@pytest.mark.parametrize("name", ["method", "source", "processor", "cores"])
def test_results_of_other_code_or_machines_go(script, results, name):
    entries = results["entries"]
    assert script.current(entries, SETTINGS) == entries
    assert script.current(entries, {**SETTINGS, name: "other"}) == []


def test_source_is_code_without_comments(script, tmp_path):
    file = tmp_path / "method.py"
    file.write_text("x = 1\n")
    before = script.source_digest(tmp_path)
    file.write_text("# One.\nx  =  1\n")
    assert script.source_digest(tmp_path) == before
    file.write_text("x = 2\n")
    assert script.source_digest(tmp_path) != before


def test_resumed_run_starts_only_what_is_missing(
    script, results, tmp_path, monkeypatch
):
    answers = {
        "time": {"error": "no such layer"},
        "memory": {"kind": "resident", "process": 1.0},
    }
    started = []

    def run_worker(task, options):
        arm = options.get("arm")
        started.append((task, options["model"], options["batch"], arm))
        return dict(answers[task])

    monkeypatch.setattr(script, "run_worker", run_worker)
    path = tmp_path / "results.json"
    plans = {COMBINATION: SETTINGS, ("jax", "cnn", 64): SETTINGS}
    script.measure(results, path, plans)
    assert sorted(started, key=str) == sorted(
        [
            ("time", "cnn", 64, None),
            ("memory", "mlp", 64, "grain_4"),
            ("memory", "mlp", 64, "grain_8"),
            ("memory", "cnn", 64, "stock"),
            ("memory", "cnn", 64, "grain_4"),
            ("memory", "cnn", 64, "grain_8"),
        ],
        key=str,
    )
    assert json.loads(path.read_text()) == results

    started.clear()
    script.measure(results, path, plans)
    assert started == [("time", "cnn", 64, None)]


def test_an_entry_takes_the_place_of_the_old_one(script, results):
    fresh = {"backend": "jax", "model": "mlp", "batch": 64, "new": True}
    for backend, batch in (("torch", 64), ("jax", 256)):
        script.put_entry(
            results, {"backend": backend, "model": "mlp", "batch": batch}
        )
    script.put_entry(results, fresh)
    assert results["entries"][0] is fresh
    assert [script.key(e) for e in results["entries"]] == [
        ("jax", "mlp", 64),
        ("jax", "mlp", 256),
        ("torch", "mlp", 64),
    ]


# ---- Markdown -------------------------------------------------------------


def test_misses_are_marked_in_plain_words(script, results):
    slow_down(results, "grain_4", 1.2501)
    slow_down(results, "grain_8", 1.15)
    text = script.to_markdown(results)
    assert "**1 of 2 ratios are above their target:**" in text
    assert "jax, mlp, batch 64, K = 4: 1.25, missed the target of 1.25" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| mlp")]
    assert "1.25 (1.05 to 1.20), **missed**" in row
    assert "1.15 (1.00 to 2.00), met" in row


def test_targets_met_are_said_too(script, results):
    slow_down(results, "grain_4", 1.0)
    slow_down(results, "grain_8", 1.0)
    text = script.to_markdown(results)
    assert "All 2 ratios are within their target." in text
    assert "missed" not in text


def test_one_table_a_backend(script, results):
    other = {**copy.deepcopy(results["entries"][0]), "backend": "torch"}
    other["settings"]["versions"] = {"torch": "2.0"}
    script.put_entry(results, other)
    lines = script.to_markdown(results).splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## jax", "## torch"]
    assert "jax 1.0." in lines
    assert "torch 2.0." in lines
    tables = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1


def test_cells_of_a_table(script, results):
    text = script.to_markdown(results)
    (row,) = [line for line in text.splitlines() if line.startswith("| mlp")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == [
        "mlp",
        "669,706",
        "64",
        "7",
        "10.0",
        "1.00 (1.00 to 1.00)",
    ]
    assert cells[-2:] == ["1.5 / 1.5 / 1.5", "4 (900) / - / -"]


def test_failures_are_shown(script, results):
    (entry,) = results["entries"]
    failed = {**entry, "batch": 256, "memory": {"stock": {"error": "killed"}}}
    del failed["arms"]
    script.put_entry(results, failed)
    rows = [
        line
        for line in script.to_markdown(results).splitlines()
        if line.startswith("| mlp")
    ]
    assert "| failed |" in rows[1]
    assert rows[1].count("|") == rows[0].count("|")
    assert "| failed / - / - |" in rows[1]


def test_a_busy_machine_is_confessed(script, results):
    assert "busy" not in script.to_markdown(results)
    results["entries"][0]["company"] = 0.4
    text = script.to_markdown(results)
    assert "**The machine was busy:** other processes took up to 40%" in text


def test_tracing_anew_is_confessed(script, results):
    assert "anew" not in script.to_markdown(results)
    results["entries"][0]["traced_again"] = True
    text = script.to_markdown(results)
    assert "a step again while it was timed:** jax mlp 64." in text


def test_nothing_measured_is_no_success(script):
    text = script.to_markdown({"machine": MACHINE, "entries": []})
    assert "Nothing was timed yet." in text
    assert "within" not in text


# ---- Options --------------------------------------------------------------


def test_options(script):
    options = script.parse([])
    assert options.backends == ["jax", "tensorflow", "torch"]
    assert options.batches == [64, 256]
    assert options.groups == [4, 8]
    assert options.steps * options.repeats >= 200
    quick = script.parse(["--quick", "--backends", "jax", "torch"])
    assert quick.backends == ["jax", "torch"]
    assert quick.steps < 10
    assert quick.batches == [64]
