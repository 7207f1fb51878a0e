"""benchmarks/step_time.py: its arms, numbers and words, on made-up times."""

import copy
import json
import re
import sys
from pathlib import Path

import keras
import pytest
from scripts import load_script

import keras_stab

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step_time.py"
# As when it is run: its folder is where it imports from.
sys.path.insert(0, str(SCRIPT.parent))

from timing import arms  # noqa: E402
from timing import markdown  # noqa: E402
from timing import measure  # noqa: E402
from timing import ratios  # noqa: E402
from timing import results as files  # noqa: E402

TIME = {"kind": "time", "backend": "jax", "workload": "mlp 64", "threads": 1}
COMPILED = {
    "kind": "compiled",
    "backend": "torch",
    "workload": "mlp 64",
    "arm": "sam",
}
SETTINGS = {
    "turns": 3,
    "seconds": 1.0,
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


def turns_of(*turns):
    """Both kinds of times, every step at place 0."""
    turns = [[(0, seconds) for seconds in turn] for turn in turns]
    return {"cpu": turns, "wall": turns}


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture
def times():
    """AdamW 10 ms in quiet turns; GRAIN a tenth and two tenths more."""
    return {
        "adamw": turns_of([0.010] * 4, [0.010] * 4, [0.030] * 4),
        "adamw_again": turns_of([0.010] * 4, [0.010] * 4, [0.030] * 4),
        "grain_4": turns_of([0.011] * 4, [0.011] * 4, [0.036] * 4),
        "grain_8": turns_of([0.012] * 4, [0.012] * 4, [0.033] * 4),
    }


@pytest.fixture
def results(times):
    entry = {
        "job": dict(TIME),
        "settings": copy.deepcopy(SETTINGS),
        "arms": ratios.summarise(times),
        "company": 0.01,
        "traced_again": False,
    }
    for figures in entry["arms"].values():
        figures["first_step_seconds"] = 1.5
    return {"machine": MACHINE, "entries": [entry]}


def set_ratio(results, arm, ratio):
    results["entries"][0]["arms"][arm]["cpu"]["ratio"] = ratio


def rows_of(text, label):
    rows = [line for line in text.splitlines() if f"| {label} |" in line]
    return [[c.strip() for c in row.strip("|").split("|")] for row in rows]


# ---- Arms -----------------------------------------------------------------


def test_every_arm_has_an_optimizer_of_its_own():
    # A method may also be a callback beside a stock optimizer.
    watched = {n for n, arm in arms.ARMS.items() if arm.callbacks(keras_stab)}
    configurations = set()
    for name, arm in arms.ARMS.items():
        optimizer = arm.make(keras.optimizers, keras_stab)
        assert isinstance(optimizer, keras.optimizers.Optimizer)
        ours = type(optimizer).__module__.startswith("keras_stab")
        assert (ours or name in watched) == (name in arms.METHODS)
        if name not in watched:
            configuration = str(optimizer.get_config())
            configurations.add(re.sub(r"'name': '\w+'", "", configuration))
    # AdamW is there twice.
    assert len(configurations) == len(arms.ARMS) - len(watched) - 1


def test_every_method_is_in_the_table():
    timed = {
        type(arms.ARMS[name].make(keras.optimizers, keras_stab))
        for name in arms.WORKLOADS[0].all_arms()
    }
    methods = {
        thing
        for thing in vars(keras_stab).values()
        if isinstance(thing, type)
        and issubclass(thing, keras.optimizers.Optimizer)
    }
    # It is SGD in a WeightAveraging.
    assert methods - timed == {keras_stab.AveragedSGD}


def test_what_is_named_exists():
    for workload in arms.ALL_WORKLOADS:
        names = {*workload.arms, *workload.memory, *workload.compiled}
        assert names <= set(arms.ARMS)
        assert {arms.ARMS[n].base or n for n in names} <= set(
            workload.all_arms()
        )
        assert set(workload.all_threads) <= set(workload.arms)
    for name, targets in arms.TARGETS.items():
        (workload,) = [w for w in arms.ALL_WORKLOADS if w.name == name]
        assert set(targets) <= set(workload.arms)
    periods = {arm.period for arm in arms.ARMS.values()}
    assert all(measure.TURN >= 3 * p or measure.TURN % p == 0 for p in periods)


# ---- Numbers --------------------------------------------------------------


def test_a_ratio_is_one_of_first_quartiles(times):
    figures = ratios.summarise(times)["grain_4"]
    assert figures["steps"] == 12
    assert figures["cpu"]["ratio"] == pytest.approx(1.1)
    assert figures["cpu"]["milliseconds"] == pytest.approx(11.0)


def test_paired_ratios_bear_a_busy_turn(times):
    assert ratios.summarise(times)["grain_4"]["wall"]["paired"] == (
        pytest.approx(1.1)
    )
    for kinds in times.values():
        kinds["wall"][1] = [(p, 3 * s) for p, s in kinds["wall"][1]]
    assert ratios.summarise(times)["grain_8"]["wall"]["paired"] == (
        pytest.approx(1.2)
    )


def test_noise_is_the_second_stock_optimizer_over_the_first(times):
    times["adamw_again"] = turns_of(*[[0.012] * 4] * 3)
    figures = ratios.summarise(times)
    assert figures["adamw_again"]["cpu"]["ratio"] == pytest.approx(1.2)
    # The others are measured against both.
    assert figures["grain_4"]["cpu"]["ratio"] == pytest.approx(1.0)


def test_places_in_a_cycle_count_alike_and_bases_differ():
    cycle = [[(i % 3, 0.005 if i % 3 == 2 else 0.002) for i in range(10)]]
    times = {
        "adamw": turns_of([0.004] * 10),
        "sgd": turns_of([0.002] * 10),
        "rapp": {"cpu": cycle, "wall": cycle},
    }
    assert ratios.summarise(times)["rapp"]["cpu"]["ratio"] == (
        pytest.approx(1.5)
    )


def test_the_first_line_of_an_error():
    assert measure.first_line(ValueError("\n No rule\nfor it")) == (
        "ValueError: No rule"
    )
    assert measure.first_line(KeyError()) == "KeyError: "


def test_the_solver_is_measured():
    answer = measure.measure_solver({"groups": [2, 8], "problems": 3})
    for figures in answer["solver"].values():
        assert figures["milliseconds"] > 0
        assert figures["gap"] < 1e-6


# ---- Resuming -------------------------------------------------------------


def test_jobs():
    jobs = files.make_jobs(arms.WORKLOADS, ["jax", "torch"], [1, "all"])
    assert TIME in jobs and COMPILED in jobs
    assert len({json.dumps(job) for job in jobs}) == len(jobs)
    compiled = [job for job in jobs if job["kind"] == "compiled"]
    assert {job["backend"] for job in compiled} == {"torch"}
    (solver,) = [job for job in jobs if job["kind"] == "solver"]
    assert solver == {"kind": "solver", "backend": "jax"}
    assert files.make_jobs(arms.WORKLOADS, ["jax"], [1], ["solver"]) == [solver]


@pytest.mark.parametrize(
    "change", [{"turns": 4}, {"source": "abd"}, {"versions": {"jax": "1.1"}}]
)
def test_other_settings_are_measured_anew(results, change):
    assert not files.is_missing(results, TIME, SETTINGS)
    assert files.is_missing(results, TIME, {**SETTINGS, **change})
    assert files.is_missing(results, {**TIME, "threads": "all"}, SETTINGS)


def test_failures_are_tried_again_but_not_what_does_not_compile(results):
    files.put(results, TIME, SETTINGS, {"error": "no such layer"})
    files.put(results, COMPILED, SETTINGS, {"error": "no answer"})
    assert files.is_missing(results, TIME, SETTINGS)
    assert not files.is_missing(results, COMPILED, SETTINGS)
    (failure,) = files.failures(results)
    assert failure == "time jax mlp 64 1: no such layer"


@pytest.mark.parametrize("name", ["method", "source", "processor", "cores"])
def test_results_of_other_code_or_machines_go(results, name):
    entries = results["entries"]
    assert files.current(entries, SETTINGS) == entries
    assert files.current(entries, {**SETTINGS, name: "other"}) == []


def test_source_is_code_without_comments(tmp_path):
    file = tmp_path / "method.py"
    file.write_text("x = 1\n")
    before = files.source_digest(tmp_path)
    digest = files.source_digest.__wrapped__
    file.write_text("# One.\nx  =  1\n")
    assert digest(tmp_path) == before
    file.write_text("x = 2\n")
    assert digest(tmp_path) != before
    (tmp_path / "games").mkdir()
    (tmp_path / "games" / "game.py").write_text("x = 1\n")
    assert digest(tmp_path, ("games",)) == digest(tmp_path, ("other", "games"))
    assert digest(tmp_path, ("games",)) != digest(tmp_path)


def test_a_job_is_of_the_code_that_it_runs():
    every = files.source_of(TIME)
    other = files.source_of({**TIME, "workload": "mlp 256"})
    assert every != other
    assert files.source_of({**COMPILED, "arm": "grain_8"}) == other


def test_everything_takes_less_than_twenty_minutes(script):
    jobs = files.make_jobs(
        arms.WORKLOADS, ["torch", "tensorflow", "jax"], [1, "all"]
    )
    seconds = sum(
        files.expected_seconds(job, 1.0) / min(2, script.at_once(job["kind"]))
        for job in jobs
    )
    assert 5 * 60 < seconds < 20 * 60


def test_a_resumed_run_starts_only_what_is_missing(
    script, results, tmp_path, monkeypatch
):
    started = []

    def run_worker(task, options, path):
        started.append((task, options["model"], options["batch"]))
        assert path == str(SCRIPT)
        return {"error": "no such layer"}

    monkeypatch.setattr(script.workers, "run_worker", run_worker)
    path = tmp_path / "results.json"
    wide = {**TIME, "workload": "wide 256", "threads": "all"}
    plans = [(job, SETTINGS) for job in (TIME, wide, COMPILED)]
    script.run(results, path, plans)
    assert started == [("time", "wide", 256), ("compiled", "mlp", 64)]
    assert json.loads(path.read_text()) == results
    started.clear()
    script.run(results, path, plans)
    assert started == [("time", "wide", 256)]


def test_what_a_worker_is_told(script):
    options = script.worker_options(TIME, SETTINGS)
    assert options["arms"][:3] == ["adamw", "adamw_again", "grain_4"]
    every = script.worker_options({**TIME, "threads": "all"}, SETTINGS)
    assert every["seconds"] == options["seconds"] / 2
    job = {"kind": "solver", "backend": "jax"}
    assert script.worker_options(job, SETTINGS)["groups"] == [8, 64]
    assert script.worker_options(COMPILED, SETTINGS)["arm"] == "sam"


def test_options(script):
    options = script.parse([])
    assert sorted(options.backends) == ["jax", "tensorflow", "torch"]
    assert options.threads == [1, "all"]
    assert script.workloads(options) == list(arms.WORKLOADS)
    asked = script.parse(["--models", "wide", "mlp", "--threads", "1"])
    assert asked.threads == [1]
    names = [workload.name for workload in script.workloads(asked)]
    assert names == ["mlp 64", "mlp 256", "wide 256"]
    assert script.parse(["--quick"]).turns == 1


# ---- Markdown -------------------------------------------------------------


def test_targets_are_met_or_missed(results):
    set_ratio(results, "grain_4", 1.1001)
    set_ratio(results, "grain_8", 1.10)
    text = markdown.to_markdown(results)
    assert "of 2 targets 1 are missed" in text
    assert rows_of(text, "GRAIN, K = 4")[0][3:] == [
        "-",
        "-",
        "1.10 (1.10, **missed**)",
    ]
    assert rows_of(text, "GRAIN, K = 8")[0][-1] == "1.10 (1.10, met)"


def test_all_figures_of_a_backend(results):
    memory = {"kind": "memory", **{n: TIME[n] for n in ("backend", "workload")}}
    files.put(
        results,
        {**memory, "arm": "grain_8"},
        SETTINGS,
        {"process": 900.0, "steps": 4.2},
    )
    results["entries"][0]["arms"]["grain_8"]["engine"] = "one_pass"
    (cells,) = rows_of(markdown.to_markdown(results), "GRAIN, K = 8")[1:]
    assert cells == [
        "mlp 64",
        "GRAIN, K = 8",
        "12",
        "12.0",
        "1.20 (1.20)",
        "1.20 (1.20)",
        "-",
        "-",
        "-",
        "1.5: 1.00 (2.00, met)",
        "4 (900)",
        "one pass",
    ]


def test_one_table_a_backend(results):
    entry = copy.deepcopy(results["entries"][0])
    answer = {name: entry[name] for name in ("arms", "company")}
    settings = {**SETTINGS, "versions": {"torch": "2.0"}}
    files.put(results, {**TIME, "backend": "torch"}, settings, answer)
    lines = markdown.to_markdown(results).splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## torch", "## jax"]
    assert "jax 1.0." in lines and "torch 2.0." in lines


def test_failures_are_shown(results):
    results["entries"][0]["arms"]["grain_8"] = {"error": "ValueError: no"}
    wide = {**TIME, "workload": "wide 256"}
    files.put(results, wide, SETTINGS, {"error": "Trace\nKeyError: 'x'"})
    text = markdown.to_markdown(results)
    assert "**Failed:** time jax wide 256 1: KeyError: 'x'" in text
    assert "failed: ValueError: no" in text
    assert files.failures(results) == [
        "time jax mlp 64 1: ValueError: no",
        "time jax wide 256 1: Trace\nKeyError: 'x'",
    ]


def test_what_does_not_compile_is_said(results):
    answer = {"arms": {"sam": {"error": "Unsupported: a branch"}}}
    files.put(results, COMPILED, SETTINGS, answer)
    (cells,) = rows_of(markdown.to_markdown(results), "SAM")
    assert cells[2] == "no: Unsupported: a branch"
    step = {"cpu": {"milliseconds": 9.0, "ratio": 1.5}}
    step["first_step_seconds"] = 30.0
    eager = {"cpu": {"milliseconds": 18.0}}
    answer = {"arms": {"adamw": step, "sam": step, "eager": eager}}
    files.put(results, COMPILED, SETTINGS, answer)
    (cells,) = rows_of(markdown.to_markdown(results), "SAM")
    assert cells[2:] == ["yes", "1.50", "0.50", "30 (30)"]
    step["uncompiled"] = "It runs uncompiled"
    (cells,) = rows_of(markdown.to_markdown(results), "SAM")
    assert cells[2] == "no: It runs uncompiled"


def test_the_solver_has_targets(results):
    figures = {"8": {"milliseconds": 0.25, "gap": 1e-9}}
    job = {"kind": "solver", "backend": "jax"}
    files.put(results, job, SETTINGS, {"solver": figures})
    text = markdown.to_markdown(results)
    assert "| 8 | 0.25 (0.10, **missed**) | 1.0e-09 |" in text


def test_a_busy_machine_is_confessed(results):
    assert "busy" not in markdown.to_markdown(results)
    results["entries"][0]["company"] = 0.4
    text = markdown.to_markdown(results)
    assert "**The machine was busy:** other processes took up to 40%" in text


def test_tracing_anew_is_confessed(results):
    assert "again while" not in markdown.to_markdown(results)
    results["entries"][0]["traced_again"] = True
    text = markdown.to_markdown(results)
    assert "a step again while it was timed:** time jax mlp 64 1." in text


def test_nothing_measured_is_no_success():
    text = markdown.to_markdown({"machine": MACHINE, "entries": []})
    assert "Nothing was timed yet." in text
    assert "met" not in text.split("How to read it")[0]
