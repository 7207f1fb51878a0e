"""The guides on SAM and IRE, with small settings and made-up data."""

import json

import numpy as np
import pytest
from scripts import load_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(module, source, folder, *options):
    """The numbers of a tiny run; checks what it prints and draws."""
    picture, numbers = folder / "picture.png", folder / "numbers.json"
    module.main(
        ["--data", str(source), "--seeds", "1", "--output", str(picture)]
        + ["--json", str(numbers), *options]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(numbers.read_text())


def test_faster_pretraining(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    module = load_script("guides/faster_pretraining.py")
    small = {"WIDTH": 8, "BLOCKS": 1, "VALIDATION_ROWS": 64, "POINTS": 1}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    runs = run(module, text, tmp_path, "--steps", "12")
    assert set(runs) == set(module.ARMS)
    ends = {arm: own[0]["loss"][-1] for arm, own in runs.items()}
    assert all(np.isfinite(list(ends.values())))
    assert runs["AdamW, 2 T"][0]["steps"][-1] == 24
    # The masks differ, and so do the arms from one another.
    assert len(set(ends.values())) == len(ends)
    assert "IRE, T" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="There is no text"):
        module.main(["--data", str(tmp_path / "nothing.txt")])


def test_flat_minima(tmp_path, capsys):
    random = np.random.default_rng(0)
    y = random.integers(0, 10, 64).astype("uint8")
    x = (random.integers(0, 99, (64, 28, 28)) + 15 * y[:, None, None]) % 256
    np.savez(
        tmp_path / "fashion_mnist.npz",
        x_train=x.astype("uint8"),
        y_train=y,
        x_test=x.astype("uint8"),
        y_test=y,
    )
    options = ("--rows", "48", "--epochs", "2", "--directions", "1")
    module = load_script("guides/flat_minima.py")
    results = run(module, tmp_path, tmp_path, *options)
    assert set(results) == set(module.ARMS)
    for own in results.values():
        around = own[0]["around"]
        # In the middle is the model itself.
        assert around[6] == pytest.approx(own[0]["train_loss"], rel=1e-3)
    assert "IRE(SAM)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="There is no"):
        module.main(["--data", str(tmp_path / "nowhere")])
