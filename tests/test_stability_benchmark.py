"""The stability benchmark, shortened: two arms, two seeds, digits."""

import json
import sys

import keras
import numpy as np
import pytest
import scripts

sys.path.insert(0, str(scripts.ROOT / "benchmarks"))

import stability_study  # noqa: E402
from stability import catalogue  # noqa: E402
from stability import figures  # noqa: E402
from stability import page  # noqa: E402
from stability import study  # noqa: E402
from stability.arms import ARMS  # noqa: E402
from stability.digits import Digits  # noqa: E402
from stability.pretrained_features import Encoder  # noqa: E402
from stability.pretrained_features import make_top  # noqa: E402

from keras_stab.diagnostics.report.run_plan import RunSeeds  # noqa: E402


@pytest.fixture
def short(monkeypatch):
    """Digits with few rows, in place of all tasks."""
    monkeypatch.setattr(
        catalogue, "TASKS", {"digits_wrong": lambda: Digits(32, 2)}
    )
    study.prepared.cache_clear()
    yield
    study.prepared.cache_clear()


def plan_in(folder, **changes):
    options = {
        "data": None,
        "folder": folder / "runs",
        "results": folder / "results",
        "seeds": 2,
        "order_seeds": 2,
        "tuning_seeds": (1000, 1001),
        "arms": ("grain_4", "half_rate"),
    }
    return study.Plan(**options | changes)


def test_the_shortened_benchmark_writes_results_and_page(short, tmp_path):
    plan = plan_in(tmp_path)
    assert stability_study.run_all(["digits_wrong"], plan, 1) == []
    results = json.loads((plan.results / "digits_wrong.json").read_text())
    assert list(results["rates"]) == ["base", "half_rate", "grain_4"]
    assert results["rates"]["half_rate"] == results["rates"]["base"] / 2
    # Only the arms that search have scores of a search.
    assert list(results["tuning"]) == ["base", "grain_4"]
    assert all(
        len(scores) == 2
        for rates in results["tuning"].values()
        for scores in rates.values()
    )
    assert plan.finished("digits_wrong") == plan.count(Digits(32, 2))
    guide = page.write(plan.results, tmp_path / "guides" / "page.md")
    text = guide.read_text()
    assert "{{" not in text
    assert "Digits" in text
    assert (guide.parent / "images" / "page.png").stat().st_size > 10_000
    # Again: nothing is trained, the results are the same.
    before = (plan.results / "digits_wrong.json").read_text()
    study.prepared.cache_clear()
    assert stability_study.run_all(["digits_wrong"], plan, 1) == []
    assert (plan.results / "digits_wrong.json").read_text() == before


def test_more_seeds_and_arms_keep_what_is_there(short, tmp_path):
    first = study.run("digits_wrong", plan_in(tmp_path, order_seeds=0))
    more = study.run(
        "digits_wrong",
        plan_in(tmp_path, order_seeds=0, seeds=3, arms=("grain_4", "tail")),
    )
    old, new = (
        own["spreads"]["everything"]["arms"]["grain_4"]["scores"]
        for own in (first, more)
    )
    assert len(new) == 3
    assert new[:2] == old
    assert list(more["rates"]) == ["base", "grain_4", "tail"]


@pytest.mark.parametrize("arm", ["decay", "grain_4", "tail", "lookahead"])
def test_a_run_does_not_see_what_was_trained_before(arm):
    seeds = RunSeeds(3, 4)

    def trained(task, rate):
        keras.utils.set_random_seed(seeds.initialisation)
        key = study.maker(arm, rate, task)
        model = task.models.rewound(key())
        task.train(model, seeds, ARMS[arm])
        return task.score(model, "test")["predictions"]

    used, new = Digits(32, 2), Digits(32, 2)
    for task in (used, new):
        task.prepare(None, None)
    trained(used, 1e-3)
    first = trained(used, 3e-3)
    np.testing.assert_array_equal(first, trained(new, 3e-3))
    assert not np.array_equal(first, trained(used, 1e-3))


def test_wrong_labels_are_as_many_as_asked_for():
    task = Digits(64, 1)
    task.prepare(None, None)
    rows, others = task.draw(5)
    assert not set(rows) & set(others)
    wrong = task.labels(rows, 5) != task.pool[1][rows]
    assert wrong.sum() == 16


def test_every_task_names_arms_that_are_there():
    for make in catalogue.TASKS.values():
        task = make()
        assert set(task.arms) <= set(ARMS)
        assert len(task.arms) >= 8
        assert len(task.rates) >= 4
        assert ARMS[task.arms[0]].rates == "search"
        assert not set(study.TUNING_SEEDS) & set(range(64))


def test_bad_tenth_and_what_is_above_the_floor():
    scores = np.arange(20.0)
    assert figures.bad_score(scores, higher=True) == 1.0
    assert figures.bad_score(scores, higher=False) == 18.0
    failed = np.where(scores == 10, np.nan, scores)
    assert figures.bad_score(failed, higher=True) == 0.0
    base = {"scores": [0.0, 10.0] * 10, "flip_floor": 3.0}
    own = {"scores": [0.0, 5.0] * 10, "flip_floor": 0.0}
    variances = [np.var([0, 10] * 10, ddof=1), np.var([0, 5] * 10, ddof=1)]
    np.testing.assert_allclose(
        figures.above_floor(base, own),
        np.sqrt(variances[1] / (variances[0] - 9)),
    )
    assert figures.above_floor(base, own | {"flip_floor": None}) is None
    assert figures.above_floor(base | {"flip_floor": 9.0}, own) is None


def test_the_top_layer_is_that_of_the_encoder():
    encoder = Encoder()
    sentences = ["a warm and funny film", "it never starts"]
    model = make_top(12, 2, encoder.top_weights())
    pooled = keras.Model(model.inputs, model.get_layer("pooled").output)
    tokens = encoder.hub.BertTextClassifierPreprocessor.from_preset(
        encoder.folder, sequence_length=12
    )(sentences)
    expected = encoder.backbone.predict(tokens, verbose=0)["pooled_output"]
    received = pooled.predict(encoder.features(sentences, 12), verbose=0)
    np.testing.assert_allclose(received, expected, atol=2e-4)
