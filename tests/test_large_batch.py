"""guides/large_batch.py: its numbers, its words, and one small run."""

import json

import keras
import numpy as np
import pytest
from scipy import stats
from scripts import load_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def guide():
    return load_script("guides/large_batch.py")


def write_data(folder, **changes):
    """Pictures in which the class is where the bright square is."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, rows in (("train", 160), ("test", 32)):
        y = random.integers(0, 10, rows).astype("uint8")
        x = random.integers(0, 60, (rows, 28, 28)).astype("uint8")
        for picture, label in zip(x, y):
            top, left = 7 * (label // 4), 7 * (label % 4)
            picture[top : top + 7, left : left + 7] = 255
        arrays |= {f"x_{split}": x, f"y_{split}": y}
    arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(folder / "fashion_mnist.npz", **arrays)
    return arrays


def made_up(guide, offsets, batches=(8,), seeds=5):
    """Runs whose accuracies differ from those of SGD by `offsets`."""
    random = np.random.default_rng(1)
    common = random.normal(80, 2, seeds)
    return {
        (batch, arm): [
            {"test_accuracy": a + offsets[arm] + random.normal(0, 0.01)}
            for a in common
        ]
        for batch in batches
        for arm in guide.ARMS
    }


EQUAL = {"SGD": 0, "LARS": 0, "LAMB": 0, "TVLARS": 0}


def test_intervals_are_those_of_paired_t_tests_that_hold_together(guide):
    runs = made_up(guide, {**EQUAL, "SGD": -1}, batches=(8, 16))
    comparisons = guide.compare(runs, level=0.94)
    assert [(c["batch"], c["rival"]) for c in comparisons] == [
        (batch, arm) for batch in (8, 16) for arm in guide.ARMS[:3]
    ]
    for c in comparisons:
        expected = stats.ttest_rel(
            guide.accuracies(runs[c["batch"], "TVLARS"]),
            guide.accuracies(runs[c["batch"], c["rival"]]),
        ).confidence_interval(1 - 0.06 / 6)
        np.testing.assert_allclose((c["low"], c["high"]), expected)


def test_verdict_names_who_is_better_and_worse(guide):
    offsets = {**EQUAL, "SGD": -2, "LAMB": 3}
    words = guide.verdict(guide.compare(made_up(guide, offsets)))
    assert words == (
        "TVLARS is better than SGD at batch 8 (+2.0), worse than LAMB at batch "
        "8 (-3.0) and not to be told from LARS. In 1 of 3 comparisons the "
        "interval contains 0."
    )


def test_verdict_lists_batches_and_rivals(guide):
    offsets = {"SGD": -2, "LARS": -1, "LAMB": -3, "TVLARS": 0}
    runs = made_up(guide, offsets, batches=(8, 16, 32))
    assert guide.verdict(guide.compare(runs)) == (
        "TVLARS is better than SGD at batch 8 (+2.0), 16 (+2.0) and 32 (+2.0), "
        "than LARS at batch 8 (+1.0), 16 (+1.0) and 32 (+1.0) and than LAMB at "
        "batch 8 (+3.0), 16 (+3.0) and 32 (+3.0). In 0 of 9 comparisons the "
        "interval contains 0."
    )


def test_identical_arms_cannot_be_told_apart(guide):
    runs = made_up(guide, EQUAL)
    runs = {cell: runs[8, "SGD"] for cell in runs}
    comparisons = guide.compare(runs)
    assert all(c["low"] == c["high"] == 0.0 for c in comparisons)
    assert "Nothing separates" in guide.verdict(comparisons)


@pytest.mark.parametrize(
    "loss, expected",
    [(0.5, False), (2.30, False), (2.31, True), (np.inf, True), (np.nan, True)],
)
def test_a_run_fails_that_ends_no_better_than_guessing(guide, loss, expected):
    assert guide.failed({"loss": [0.1, loss]}) is expected
    run = {"loss": [loss], "held_out_accuracy": [10.0, 70.0]}
    assert guide.score(run) == (0.0 if expected else 70.0)


def test_best_rates_and_those_at_an_edge(guide):
    scores = {
        (batch, arm): {0.1: 50.0, 0.3: 70.0, 0.9: 60.0}
        for batch in (8, 64)
        for arm in guide.ARMS
    }
    scores[64, "SGD"] = {0.1: 50.0, 0.3: 60.0, 0.9: 70.0}
    rates, edges = guide.best_rates(scores)
    assert rates["SGD"] == {8: 0.3, 64: 0.9}
    assert rates["TVLARS"] == {8: 0.3, 64: 0.3}
    assert edges == [(64, "SGD")]


def test_rates_between_the_tuned_batch_sizes_follow_a_power(guide, monkeypatch):
    monkeypatch.setitem(guide.RATES, "SGD", {100: 0.1, 1600: 1.6})
    rates = [guide.picked_rate("SGD", b) for b in (10, 100, 400, 1600, 5000)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.4, 1.6, 1.6])


def test_each_arm_is_tuned_as_much_and_not_at_an_edge(guide):
    for arm, grid in guide.GRIDS.items():
        np.testing.assert_allclose(np.divide(grid[1:], grid[:-1]), [3] * 3)
        assert set(guide.RATES[arm]) == {512, 4096}
        assert all(rate in grid[1:-1] for rate in guide.RATES[arm].values())


def test_only_tvlars_starts_without_warm_up_among_the_layerwise(guide):
    for arm in guide.ARMS:
        factor = guide.rate_over_time(arm, 100)
        assert factor.shape == (101,)
        assert (factor[0] == 0.0) == (arm in ("LARS", "LAMB"))
        assert factor[-1] < 0.05
    phi = guide.rate_over_time("TVLARS", 100)
    np.testing.assert_allclose(phi[[10, 70]], [0.901, 0.101], atol=1e-5)


def test_data_parts_share_no_row(guide, tmp_path):
    arrays = write_data(tmp_path)
    data = guide.load_data(tmp_path, 100, 60)
    parts = [data[part][0] for part in ("train", "held_out")]
    rows = {row.tobytes() for x in parts for row in x}
    assert [len(x) for x in parts] == [100, 60] and len(rows) == 160
    x, y = data["test"]
    np.testing.assert_array_equal(y, arrays["y_test"])
    np.testing.assert_allclose(
        x[..., 0] * 0.353 + 0.286, arrays["x_test"] / 255.0, atol=1e-6
    )


def test_missing_or_wrong_data_is_named(guide, tmp_path):
    with pytest.raises(SystemExit, match="--data or .*FASHION_MNIST"):
        guide.load_data(None, 10, 10)
    with pytest.raises(SystemExit, match="no file .*x_train .rows, 28, 28."):
        guide.load_data(tmp_path, 10, 10)
    write_data(tmp_path, y_test=None)
    with pytest.raises(SystemExit, match="must hold the arrays"):
        guide.load_data(tmp_path, 10, 10)
    write_data(tmp_path)
    with pytest.raises(SystemExit, match="has 160 training rows. Received"):
        guide.load_data(tmp_path, 150, 11)


def test_a_batch_larger_than_the_data_is_refused(guide, capsys):
    with pytest.raises(SystemExit):
        guide.parse(["--rows", "64", "--batches", "16", "128"])
    assert "a batch of 128 needs as many --rows" in capsys.readouterr().err


def test_small_run_trains_prints_and_draws(
    guide, tmp_path, capsys, monkeypatch
):
    write_data(tmp_path)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    picture, numbers = tmp_path / "a.png", tmp_path / "a.json"
    guide.main(
        ["--rows", "128", "--held-out", "32", "--batches", "64"]
        + ["--epochs", "2", "--seeds", "2"]
        + ["--output", str(picture), "--json", str(numbers)]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    numbers = json.loads(numbers.read_text())
    assert numbers["backend"] == keras.backend.backend()
    for words in (*guide.ARMS, "TVLARS", numbers["verdict"][:40]):
        assert words in printed
    runs = {(run["arm"], run["seed"]): run for run in numbers["runs"]}
    assert len(runs) == 8
    for arm in guide.ARMS:
        one, other = runs[arm, 0], runs[arm, 1]
        assert one["updates"] == 4
        assert one["loss"] != other["loss"]
        for name, ratios in one["trust_ratios"].items():
            assert name in ("conv1", "conv2", "conv3", "dense")
            assert len(ratios) == 2 and ratios[0] != ratios[1] > 0
        assert len(one["trust_ratios"]) == (0 if arm == "SGD" else 4)
    # A run starts from the start, whatever the model was trained for before.
    data = guide.load_data(tmp_path, 128, 32)
    rate = guide.picked_rate("TVLARS", 64)
    trainer = guide.Trainer("TVLARS", 64, rate, data, 2)
    for seed in (1, 0):
        again = trainer.run(seed)
        before = runs["TVLARS", seed]
        np.testing.assert_allclose(again["loss"], before["loss"], rtol=1e-4)
        assert trainer.test_accuracy() == pytest.approx(before["test_accuracy"])


def test_tuning_prints_what_the_guide_records(
    guide, tmp_path, capsys, monkeypatch
):
    """With made-up scores: the search itself trains as the small run does."""

    class Trainer:
        def __init__(self, arm, batch, rate, data, epochs):
            self.accuracy = 90.0 - abs(np.log(rate / guide.GRIDS[arm][1]))

        def run(self, seed, advance):
            assert seed in guide.TUNING_SEEDS
            return {"loss": [1.0], "held_out_accuracy": [self.accuracy]}

    write_data(tmp_path)
    monkeypatch.setattr(guide, "Trainer", Trainer)
    guide.main(
        ["--tune", "--data", str(tmp_path), "--rows", "128"]
        + ["--held-out", "32", "--batches", "32", "64", "128"]
    )
    printed = capsys.readouterr().out
    assert "At an edge" not in printed
    line = next(x for x in printed.splitlines() if x.startswith("RATES = "))
    rates = eval(line.removeprefix("RATES = "))
    assert rates == {
        arm: {32: grid[1], 128: grid[1]} for arm, grid in guide.GRIDS.items()
    }
