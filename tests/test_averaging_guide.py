"""guides/averaging.py: its mathematics, and one tiny run."""

import json

import numpy as np
import pytest
from scripts import load_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def guide():
    return load_script("guides/averaging.py")


def test_smoothing_fills_the_well(guide):
    x = np.linspace(-1.0, 3.0, 401)
    by_rate = {r: guide.smoothed(guide.well, x, r) for r in (1e-4, 0.6)}
    np.testing.assert_allclose(by_rate[1e-4], guide.well(x), atol=1e-4)
    assert x[np.argmin(by_rate[1e-4])] == pytest.approx(2.0, abs=0.02)
    assert x[np.argmin(by_rate[0.6])] == pytest.approx(0.0, abs=0.4)
    # A square is smoothed by adding the variance of the noise.
    squares = guide.smoothed(np.square, x, 0.5)
    np.testing.assert_allclose(squares, x**2 + 0.25, atol=1e-9)


def test_missing_data_is_named(guide, tmp_path):
    with pytest.raises(SystemExit, match="fashion_mnist.npz"):
        guide.load_images(tmp_path, 10)


def test_tiny_run(guide, tmp_path, capsys):
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (192, 28, 28)).astype("uint8"),
        "x_test": random.integers(0, 256, (64, 28, 28)).astype("uint8"),
    }
    for part in ("train", "test"):
        size = len(arrays[f"x_{part}"])
        arrays[f"y_{part}"] = random.integers(0, 10, size).astype("uint8")
    np.savez(tmp_path / "fashion_mnist.npz", **arrays)
    small = ["--seeds", "2", "--epochs", "1", "--rows", "192"]
    small += ["--chains", "40", "--steps", "60"]
    folder = str(tmp_path)
    with pytest.warns(UserWarning, match="batch-norm layers"):
        guide.main(["--data", folder, "--output", folder, *small])
    for name in ("well", "slopes", "cnn"):
        picture = tmp_path / f"averaging_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "averaging.json").read_text())
    assert np.shape(numbers["accuracies"]) == (3, 2, 3)
    printed = capsys.readouterr().out
    for words in ("theory 0.5", "Final rate", "new statistics"):
        assert words in printed
