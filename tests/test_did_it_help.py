"""guides/did_it_help.py with tiny settings and made-up pictures."""

import json

import keras
import numpy as np
import pytest
from scripts import load_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_small_run_trains_prints_and_draws(tmp_path, capsys, monkeypatch):
    compile = keras.Sequential.compile

    def compile_eagerly(model, *arguments):
        # To trace fifteen models would take most of the time.
        compile(model, *arguments, run_eagerly=True)

    monkeypatch.setattr(keras.Sequential, "compile", compile_eagerly)
    random = np.random.default_rng(0)
    y = random.integers(0, 10, 60).astype("uint8")
    x = (random.integers(0, 99, (60, 28, 28)) + 15 * y[:, None, None]) % 256
    x = x.astype("uint8")
    np.savez(
        tmp_path / "fashion_mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y
    )
    guide = load_script("guides/did_it_help.py")
    picture, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    guide.main(
        ["--data", str(tmp_path), "--seeds", "3", "--rows", "50"]
        + ["--epochs", "1", "--output", str(picture), "--json", str(numbers)]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert set(found["comparisons"]) == set(guide.ARMS) - {"AdamW"}
    assert set(found["varies"]) == {"both", "initialisation", "order"}
    assert found["arms"]["AdamW"]["agreement"] > 0
    accuracy = found["runs"][0]["metrics"]["accuracy"]
    floor = found["arms"]["AdamW"]["binomial_floor"]
    assert 0 <= accuracy <= 100 and floor is not None
    printed = capsys.readouterr().out
    for words in ("SAM(AdamW) against AdamW", "initialisation", "0.25"):
        assert words in printed
    with pytest.raises(SystemExit, match="There is no"):
        guide.main(["--data", str(tmp_path / "nowhere"), "--seeds", "3"])
