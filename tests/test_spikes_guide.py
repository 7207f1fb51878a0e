"""guides/spikes.py with tiny settings and made-up pictures."""

import json

import numpy as np
import pytest
from scripts import load_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_small_run_trains_prints_and_draws(tmp_path, capsys, monkeypatch):
    random = np.random.default_rng(0)
    y = random.integers(0, 10, 60).astype("uint8")
    x = (random.integers(0, 99, (60, 28, 28)) + 15 * y[:, None, None]) % 256
    x = x.astype("uint8")
    np.savez(
        tmp_path / "fashion_mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y
    )
    guide = load_script("guides/spikes.py")
    for name, value in (("BATCH", 5), ("WINDOW", 8), ("BROKEN", 0.2)):
        monkeypatch.setattr(guide, name, value)
    few = ("skip", "SGD")
    monkeypatch.setattr(guide, "ARMS", {n: guide.ARMS[n] for n in few})
    picture, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    guide.main(
        ["--data", str(tmp_path), "--seeds", "3", "--rows", "50"]
        + ["--epochs", "2", "--output", str(picture), "--json", str(numbers)]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert set(found["comparisons"]) == {"SGD"}
    runs = [(own["arm"], own["metrics"]["spikes"]) for own in found["runs"]]
    assert len(runs) == 6
    assert all(count == 0 for arm, count in runs if arm == "SGD")
    assert "SGD" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="There is no"):
        guide.main(["--data", str(tmp_path / "nowhere"), "--seeds", "3"])
