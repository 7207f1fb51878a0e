"""`stability_report`: what it runs, keeps, refuses and writes."""

import builtins
import functools
import json
import math
import re
import sys
import types

import keras
import numpy as np
import pytest
from workers import report_runs

import keras_stab
from keras_stab.diagnostics.report.one_run import is_failure
from keras_stab.diagnostics.report.workers import check_sendable

SGD = functools.partial(keras.optimizers.SGD, 0.1)
ARMS = {"SGD": SGD, "Adam": keras.optimizers.Adam}


def report(folder, build_and_fit=report_runs.simulated, arms=ARMS, **options):
    options = {"seeds": 6, "pictures": False, "progress": False, **options}
    return keras_stab.stability_report(
        build_and_fit, arms, folder=folder, **options
    )


def test_figures_files_and_words(tmp_path):
    calls = []

    def build_and_fit(optimizer, seeds):
        calls.append((type(optimizer).__name__, seeds))
        return report_runs.simulated(optimizer, seeds)

    found = report(tmp_path, build_and_fit, pictures=True, progress=True)
    # Both arms on the same seeds, seed by seed.
    assert calls[:3] == [("SGD", (0, 0)), ("Adam", (0, 0)), ("SGD", (1, 1))]
    assert len(calls) == 12
    comparison = found.comparisons["Adam"]
    scores = [found.scores(arm) for arm in ("SGD", "Adam")]
    expected = keras_stab.compare_scores(*scores, names=("SGD", "Adam"))
    assert comparison == expected
    assert comparison.answers["mean"] == "better"
    assert comparison.difference.value == pytest.approx(1.0, abs=0.2)
    assert found.arms["SGD"].mean == pytest.approx(scores[0].mean())
    page = (tmp_path / "report.md").read_text()
    for words in (found.verdict.split(".")[0], "Adam minus SGD", "halves"):
        assert words in page
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["verdict"] == found.verdict
    assert numbers["comparisons"]["Adam"]["pairs"] == 6
    assert len(numbers["runs"]) == 12
    assert "Adam against SGD" in str(found)
    # Nothing is left to do; a report on old runs trains nothing.
    again = report(tmp_path, build_and_fit)
    assert len(calls) == 12
    assert again.verdict == found.verdict


@pytest.mark.parametrize(
    "seeds, vary, expected",
    [
        (3, "both", [(0, 0), (1, 1), (2, 2)]),
        ([4, 7], "initialisation", [(4, 0), (7, 0)]),
        (np.arange(2), "order", [(0, 0), (0, 1)]),
        ([(1, 5), (1, 6)], "both", [(1, 5), (1, 6)]),
    ],
)
def test_seeds(tmp_path, seeds, vary, expected):
    seen = []

    def build_and_fit(optimizer, seeds):
        # What Keras draws next follows the seed of the initialisation.
        drawn = keras.initializers.RandomNormal()((1,))
        seen.append((seeds, float(drawn[0])))
        return float(len(seen))

    report(tmp_path, build_and_fit, {"SGD": SGD}, seeds=seeds, vary=vary)
    assert [tuple(pair) for pair, _ in seen] == expected
    for pair, drawn in seen:
        same = [d for p, d in seen if p.initialisation == pair.initialisation]
        assert set(same) == {drawn}


def test_an_interruption_loses_only_the_run_in_progress(tmp_path):
    calls = []

    def build_and_fit(optimizer, seeds):
        calls.append(seeds)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return report_runs.simulated(optimizer, seeds)

    with pytest.raises(KeyboardInterrupt):
        report(tmp_path, build_and_fit)
    assert len(list((tmp_path / "runs").iterdir())) == 3
    # What a process that was killed while it wrote leaves behind.
    (tmp_path / "runs" / ".half.json.1.partial").write_text('{"arm": "SG')
    found = report(tmp_path, build_and_fit)
    assert len(calls) == 4 + 9
    whole = report(tmp_path / "whole")
    np.testing.assert_array_equal(found.scores("Adam"), whole.scores("Adam"))
    # More seeds and more arms later: only these are run.
    more = {**ARMS, "Adam again": keras.optimizers.Adam}
    report(tmp_path, build_and_fit, more, seeds=7)
    assert len(calls) == 13 + 2 + 7


def test_another_configuration_is_refused(tmp_path):
    report(tmp_path, settings={"epochs": 3})
    faster = {**ARMS, "SGD": functools.partial(keras.optimizers.SGD, 0.2)}
    for options, words in (
        ({"arms": faster}, "optimizer.config.learning_rate: 0.1"),
        ({"settings": {"epochs": 4}}, "settings.epochs: 3 then, 4 now"),
        ({"build_and_fit": lambda optimizer, seeds: 1.0}, "build_and_fit"),
    ):
        with pytest.raises(ValueError, match="another configuration") as error:
            report(tmp_path, **{"settings": {"epochs": 3}, **options})
        assert words in str(error.value)
        assert "Choose another `folder`" in str(error.value)


def test_processes_train_the_same_and_survive_a_kill(tmp_path):
    """Training here and in two processes gives the same bits."""
    options = {"seeds": 2, "metric": "accuracy"}
    here = report(tmp_path / "here", report_runs.trained, **options)
    troubled = report_runs.Troubled(tmp_path)
    folder = tmp_path / "there"
    with pytest.raises(RuntimeError, match="call again") as error:
        report(folder, troubled, processes=2, **options)
    assert "with seeds (1, 1) ended with exit code -9" in str(error.value)
    kept = list((folder / "runs").iterdir())
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    with pytest.raises(TypeError, match="a mistake in the code") as error:
        report(folder, troubled, processes=2, **options)
    assert "In the run of arm" in "".join(error.value.__notes__)
    there = report(folder, troubled, **options)
    assert times == [path.stat().st_mtime_ns for path in kept]
    for arm in ARMS:
        for one, other in zip(here.runs[arm], there.runs[arm]):
            assert one["metrics"] == other["metrics"]
            assert one["predictions"] == other["predictions"]
        starts = here.column(arm, "start")
        assert starts[0] != starts[1]
        assert here.column(arm, "losses").shape == (2, 1)
        summary = here.arms[arm]
        assert 0 <= summary.agreement <= 1
        share = summary.mean
        floor = math.sqrt(share * (1 - share) / 32)
        assert summary.binomial_floor == pytest.approx(floor)
        assert summary.flip_floor is not None
    # The arms of a seed start from the same weights.
    np.testing.assert_array_equal(
        here.column("SGD", "start"), here.column("Adam", "start")
    )


def test_what_cannot_be_sent_is_named(tmp_path):
    with pytest.raises(ValueError, match="Arm 'SGD' cannot be sent"):
        report(tmp_path, arms={"SGD": lambda: SGD()}, processes=2)
    with pytest.raises(ValueError, match="`build_and_fit` cannot be sent"):
        report(tmp_path, lambda optimizer, seeds: 1.0, processes=2)


@pytest.mark.parametrize(
    "outcome",
    [
        math.nan,
        {"score": 80.0, "loss": math.inf},
        {"score": 80.0, "predictions": np.full((4, 3), np.nan)},
        FloatingPointError("invalid value"),
        MemoryError(),
        type("ResourceExhaustedError", (Exception,), {})("no memory"),
    ],
    ids=["nan", "loss", "predictions", "floating", "memory", "backend"],
)
def test_a_run_that_diverges_is_recorded(tmp_path, outcome):
    calls = []

    def build_and_fit(optimizer, seeds):
        calls.append(seeds)
        if seeds.order == 2 and isinstance(optimizer, keras.optimizers.Adam):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return {"score": report_runs.simulated(optimizer, seeds)}

    for _ in range(2):
        found = report(tmp_path, build_and_fit, metric="score", seeds=4)
        assert found.arms["Adam"].failed == 1
        assert found.comparisons["Adam"].pairs == 3
        assert np.isnan(found.scores("Adam")[2])
        assert "1 of 4 runs with Adam failed" in found.verdict
        assert "seeds (2, 2)" in (tmp_path / "report.md").read_text()
    assert len(calls) == 8


@pytest.mark.parametrize(
    "kind, text, failure",
    [
        ("JaxRuntimeError", "RESOURCE_EXHAUSTED: out of memory", True),
        ("JaxRuntimeError", "INVALID_ARGUMENT: shapes", False),
        ("InvalidArgumentError", "check_numerics: Tensor had NaN", True),
        ("InvalidArgumentError", "shapes must agree", False),
        ("OutOfMemoryError", "CUDA", True),
        ("ZeroDivisionError", "division by zero", False),
    ],
)
def test_which_errors_are_failures_of_training(kind, text, failure):
    base = getattr(builtins, kind, RuntimeError)
    assert is_failure(type(kind, (base,), {})(text)) is failure


def test_what_was_defined_in_a_session_cannot_be_sent(monkeypatch):
    session = types.ModuleType("__main__")
    session.work = types.FunctionType((lambda: None).__code__, {}, "work")
    session.work.__module__ = "__main__"
    session.work.__qualname__ = "work"
    monkeypatch.setitem(sys.modules, "__main__", session)
    with pytest.raises(ValueError, match="in a session, not in a file"):
        check_sendable("`build_and_fit`", session.work)


def test_a_difference_below_the_test_set_floor_is_qualified(tmp_path):
    found = report(tmp_path, test_rows=100)
    share = found.arms["SGD"].mean / 100
    floor = 100 * math.sqrt(share * (1 - share) / 100)
    assert found.arms["SGD"].binomial_floor == pytest.approx(floor)
    assert floor > found.comparisons["Adam"].difference.value
    assert "is better" in found.verdict
    assert "smaller than the deviation of an accuracy" in found.verdict
    found = report(tmp_path, test_rows=100_000)
    assert "new test set" not in found.verdict


def test_a_failure_score_counts_runs_that_learned_nothing(tmp_path):
    found = report(tmp_path, failure_score=80.0)
    expected = np.sum(found.scores("SGD") <= 80.0)
    assert found.arms["SGD"].failed == expected > 0
    assert found.comparisons["Adam"].pairs == 6


def test_all_runs_of_an_arm_may_fail(tmp_path):
    def build_and_fit(optimizer, seeds):
        if isinstance(optimizer, keras.optimizers.Adam):
            raise FloatingPointError("diverged")
        return report_runs.simulated(optimizer, seeds)

    found = report(tmp_path, build_and_fit, seeds=8, pictures=True)
    assert found.arms["Adam"].mean is None
    assert found.comparisons["Adam"].answers["failures"] == "more"
    assert "We cannot tell which is better" in found.verdict
    assert json.loads((tmp_path / "report.json").read_text())


def test_a_mistake_in_the_code_surfaces(tmp_path):
    with pytest.raises(TypeError, match="a mistake") as error:
        report(tmp_path, report_runs.mistaken)
    assert "arm 'SGD' with seeds (0, 0)" in error.value.__notes__[0]


def test_metrics_by_name(tmp_path):
    def build_and_fit(optimizer, seeds):
        return {
            "val_loss": report_runs.simulated(optimizer, seeds),
            "accuracy": np.float32(0.5),
        }

    for metric, message in (
        (None, "which one to compare"),
        ("auc", "no 'auc'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            report(tmp_path, build_and_fit, metric=metric)
        assert "'val_loss', 'accuracy'" in str(error.value)
    # The run that brought it to light is kept.
    assert len(list((tmp_path / "runs").iterdir())) == 1
    found = report(tmp_path, build_and_fit, metric="val_loss")
    assert not found.higher_is_better
    assert found.comparisons["Adam"].answers["mean"] == "worse"


@pytest.mark.parametrize(
    "result, message",
    [
        ({}, "a number or a dict"),
        ("good", "a number or a dict of numbers"),
        (None, "a function without `return`"),
        ([0.5, 0.7], "return_dict=True"),
        (np.ones(2), "at least one number"),
        ({"a": "good"}, "must be a number"),
        ({"a": np.ones((2, 2))}, "a list of numbers"),
        ({"a": 1.0, "predictions": [0.2, 0.7]}, "whole numbers"),
        ({"a": 1.0, "predictions": [[0.2], [0.7]]}, "into classes"),
        (
            {"a": 1.0, "predictions": [0, 1], "targets": [0]},
            "do not belong together",
        ),
    ],
)
def test_results_that_cannot_be_used(tmp_path, result, message):
    with pytest.raises(ValueError, match=message):
        report(tmp_path, lambda optimizer, seeds: result)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": 1}, "at least two seeds; five or more"),
        ({"seeds": [3]}, "at least two seeds"),
        ({"seeds": [3, 3]}, "only once"),
        ({"seeds": [0.5, 1]}, "whole number"),
        ({"seeds": [-1, 1]}, "whole number"),
        ({"seeds": [(0, 1), (1, 2)], "vary": "order"}, "leave out"),
        ({"vary": "weights"}, "`vary` must be one of"),
        ({"arms": {}}, "At least one arm"),
        ({"arms": SGD}, "`arms` must be a dict"),
        ({"arms": [SGD, SGD]}, "`arms` must be a dict"),
        ({"arms": [("A", SGD), ("A", SGD)]}, r"its own name.*: \['A'\]"),
        ({"arms": {"A": "sgd"}}, "function without arguments"),
        ({"arms": {"A": lambda: "sgd"}}, "must make a Keras optimizer"),
        ({"arms": {3: SGD}}, "name is a string"),
        ({"processes": 0}, "`processes` must be"),
        ({"build_and_fit": 0.5}, "`build_and_fit` must be a function"),
        ({"level": 95}, "`level` must be in"),
        ({"questions": "mean"}, "`questions` must be"),
        ({"relevant_difference": -1.0}, "`relevant_difference` must be"),
        ({"higher_is_better": "yes"}, "`higher_is_better` must be"),
        ({"failure_score": "0.5"}, "`failure_score` must be"),
        ({"test_rows": 0}, "`test_rows` must be"),
        ({"unit": 3}, "`unit` must be"),
        ({"metric": ["loss"]}, "`metric` must be a string"),
        ({"pictures": "no"}, "`pictures` must be"),
        ({"seeds": "all"}, "`seeds` must be"),
        ({"seeds": 2.5}, "`seeds` must be"),
        ({"settings": {"f": print}}, "what JSON can"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        report(tmp_path / "none", **options)
    # Nothing was trained for it.
    assert not list(tmp_path.rglob("*.json"))


def test_an_optimizer_in_place_of_a_function(tmp_path):
    one = keras.optimizers.SGD()
    with pytest.raises(ValueError, match="makes a new optimizer for each run"):
        report(tmp_path, arms={"A": one})
    with pytest.raises(ValueError, match="the same optimizer again"):
        report(tmp_path, arms={"A": lambda: one})


def test_arms_with_all_but_the_same_name_have_their_own_files(tmp_path):
    arms = {"IRE(SAM)": SGD, "IRE SAM": keras.optimizers.Adam}
    found = report(tmp_path, arms=arms)
    assert len(list((tmp_path / "runs").iterdir())) == 12
    assert np.all(found.scores("IRE(SAM)") != found.scores("IRE SAM"))


# ---- Run files ------------------------------------------------------------


def first_run(tmp_path):
    """The file of SGD with seeds (0, 0), after a report."""
    report(tmp_path, seeds=2)
    (path,) = (tmp_path / "runs").glob("SGD-*-0-0.json")
    return path


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: b"\xff\xfe\x00".decode("latin1"), "is damaged"),
        (lambda text: "[]", "a list instead of a dict"),
        (lambda text: text.replace('"metrics"', '"numbers"'), "no 'metrics'"),
        (lambda text: text.replace('"seconds"', '"time"'), "no 'seconds'"),
        (lambda text: edited(text, metrics={}), "no score"),
        (lambda text: edited(text, metrics={"score": "1"}), "'score' is '1'"),
        (lambda text: edited(text, configuration=None), "'configuration' is"),
    ],
)
def test_a_damaged_run_file_is_named_and_run_again(tmp_path, damage, message):
    path = first_run(tmp_path)
    whole = path.read_text()
    path.write_text(damage(whole), encoding="latin1")
    with pytest.raises(ValueError, match=message) as error:
        report(tmp_path, seeds=2)
    assert str(path) in str(error.value)
    assert "Remove this file, and the run of arm 'SGD'" in str(error.value)
    path.unlink()
    report(tmp_path, seeds=2)
    old, new = json.loads(whole), json.loads(path.read_text())
    assert new["metrics"] == old["metrics"]


def edited(text, **parts):
    return json.dumps({**json.loads(text), **parts})


@pytest.mark.parametrize(
    "parts, received",
    [
        ({"seeds": [1, 1]}, "arm 'SGD' with seeds (1, 1)"),
        ({"arm": "Adam"}, "arm 'Adam' with seeds (0, 0)"),
    ],
)
def test_a_file_of_another_run_is_refused(tmp_path, parts, received):
    path = first_run(tmp_path)
    path.write_text(edited(path.read_text(), **parts))
    with pytest.raises(ValueError, match="should hold the run") as error:
        report(tmp_path, seeds=2)
    assert str(path) in str(error.value) and received in str(error.value)


def test_runs_with_different_metrics_are_refused(tmp_path):
    """At once, in this call or in files of an earlier one."""

    def build_and_fit(optimizer, seeds):
        names = {0: "accuracy", 1: "score"}
        return {names[seeds.order]: 0.5}

    with pytest.raises(ValueError, match="no 'accuracy'") as error:
        report(tmp_path, build_and_fit, seeds=2)
    assert "'score' from the run of arm 'SGD'" in str(error.value)
    assert len(list((tmp_path / "runs").iterdir())) == 3
    other = tmp_path / "other"
    path = first_run(other)
    path.write_text(edited(path.read_text(), metrics={"auc": 0.5}))
    with pytest.raises(ValueError, match="no 'auc', which is compared"):
        report(other, seeds=2)
    with pytest.raises(ValueError, match="no 'score', which is compared"):
        report(other, seeds=2, metric="score")
