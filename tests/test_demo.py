"""guides/demo.py: its data, its words, and two tiny runs."""

import json

import numpy as np
import pytest
from scripts import load_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def demo():
    return load_script("guides/demo.py")


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


def test_tiny_run_prints_draws_and_keeps_its_report(demo, tmp_path, capsys):
    picture, folder = tmp_path / "demo.png", tmp_path / "report"
    options = ["--seeds", "2", "--epochs", "1", "--output", str(picture)]
    demo.main([*options, "--report", str(folder)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in ("AdamW", "GRAIN(AdamW)", "95 % interval", "points"):
        assert words in printed
    verdict = json.loads((folder / "report.json").read_text())["verdict"]
    assert verdict in " ".join(printed.split())
    assert len(list((folder / "runs").iterdir())) == 4


def run(demo, folder, *options):
    path = folder / "demo.json"
    demo.main(
        ["--seeds", "2", "--epochs", "1", "--json", str(path)]
        + ["--output", str(folder / "demo.png"), *options]
    )
    return json.loads(path.read_text())
