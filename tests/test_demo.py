"""guides/demo.py: its statistics, its words, and one tiny run."""

import json

import numpy as np
import pytest
from scipy import stats
from scripts import load_script


@pytest.fixture(scope="module")
def demo():
    return load_script("guides/demo.py")


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_is_that_of_the_paired_t_test(demo, count, level):
    random = np.random.default_rng(count)
    a = random.normal(80, 3, count)
    b = a + random.normal(1, 2, count)
    expected = stats.ttest_rel(b, a).confidence_interval(level)
    mean, low, high = demo.paired_interval(a, b, level)
    np.testing.assert_allclose(mean, np.mean(b) - np.mean(a))
    np.testing.assert_allclose((low, high), expected)


def test_interval_needs_two_pairs(demo):
    with pytest.raises(ValueError, match="at least two pairs. Received: 1"):
        demo.paired_interval([90.0], [91.0])


def test_identical_arms_cannot_be_told_apart(demo):
    interval = demo.paired_interval([80.0, 85.0, 90.0], [80.0, 85.0, 90.0])
    assert interval == (0.0, 0.0, 0.0)
    assert "cannot tell" in demo.verdict(*interval)


@pytest.mark.parametrize("interval", [(1.0, -0.5, 2.5), (-1.0, -2.0, 0.0)])
def test_an_interval_that_contains_0_gives_no_winner(demo, interval):
    words = demo.verdict(*interval)
    assert "cannot tell" in words
    assert "better" not in words and "worse" not in words


def test_verdict_names_size_and_direction(demo):
    assert demo.verdict(3.1, 1.2, 5.0) == (
        "GRAIN is better by 3.10 points (95 % interval 1.20 to 5.00)."
    )
    assert demo.verdict(-3.1, -5.0, -1.2) == (
        "GRAIN is worse by 3.10 points (95 % interval 1.20 to 5.00)."
    )


def test_data_has_the_share_of_wrong_labels_and_a_clean_rest(demo):
    digits = demo.load_digits(return_X_y=True)
    classes = {(x / 16).astype("float32").tobytes(): y for x, y in zip(*digits)}
    data = demo.load_data(seed=5)
    truth = np.array([classes[row.tobytes()] for row in data["x"]])
    np.testing.assert_array_equal(data["y"] != truth, data["wrong"])
    assert data["wrong"].sum() == round(demo.WRONG_SHARE * demo.TRAIN_ROWS)
    test_truth = [classes[row.tobytes()] for row in data["x_test"]]
    np.testing.assert_array_equal(data["y_test"], test_truth)
    assert len(data["y"]) + len(data["y_test"]) == len(classes)


def test_order_changes_each_epoch_and_repeats_with_the_seed(demo):
    x = np.arange(100)

    def order(batches):
        return np.concatenate([batches[i][0] for i in range(len(batches))])

    one, other = (
        demo.Shuffled(x, x, 64, seed=3, keep_rest=True) for _ in range(2)
    )
    first = order(one)
    np.testing.assert_array_equal(np.sort(first), x)
    np.testing.assert_array_equal(first, order(other))
    one.on_epoch_end()
    assert np.any(order(one) != first)


def test_one_group_equals_the_plain_arm_seed_by_seed(demo, tmp_path):
    numbers = run(demo, tmp_path, "--groups", "1")
    assert numbers["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    plain, grain = numbers["runs"][:2], numbers["runs"][2:]
    for a, b in zip(plain, grain):
        assert a["seed"] == b["seed"]
        for key in ("test_accuracy_per_epoch", "wrong_labels_learned"):
            assert a[key] == b[key]
    assert plain[0]["test_accuracy"] != plain[1]["test_accuracy"]


def test_tiny_run_prints_and_draws(demo, tmp_path, capsys):
    picture = tmp_path / "demo.png"
    demo.main(["--seeds", "2", "--epochs", "1", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in ("AdamW", "GRAIN(AdamW)", "95 % interval", "points"):
        assert words in printed


def run(demo, folder, *options):
    path = folder / "demo.json"
    demo.main(
        ["--seeds", "2", "--epochs", "1", "--json", str(path)]
        + ["--output", str(folder / "demo.png"), *options]
    )
    return json.loads(path.read_text())
