"""The guides on games: their parts, and tiny runs."""

import json

import numpy as np
import pytest
from scripts import load_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_min_max(tmp_path, capsys):
    guide = load_script("guides/min_max.py")
    chosen = ["descent", "RAPP"]
    guide.main(
        ["--output", str(tmp_path), "--games", "bilinear", "--gradients", "90"]
        + ["--methods", *chosen]
    )
    for name in ("paths", "distances"):
        picture = tmp_path / f"min_max_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    own = json.loads((tmp_path / "min_max.json").read_text())["bilinear"]
    assert list(own) == chosen
    # Descent grows by sqrt(1.01) a step; RAPP shrinks by 0.601.
    start = np.hypot(1.0, 0.5)
    grown = start * 1.01**45
    assert own["descent"]["last_distance"] == pytest.approx(grown, rel=1e-3)
    assert own["descent"]["verdict"] == "cycles"
    assert own["RAPP"]["first_close"] == 57
    assert "rho L" in capsys.readouterr().out


def test_the_verdicts_of_min_max():
    guide = load_script("guides/min_max.py")
    path = np.zeros((4, 2))
    for distances, verdict in (
        ([1.0, 1e-5, 1.0, 1e-5], "9"),
        ([1.0, 1e-5, 1e-6, 1e-5], "3"),
        ([1.0, 2.0, 5.0, 11.0], "diverges"),
        ([1.0, 2.0, 5.0, np.nan], "diverges"),
        ([1.0, 0.5, 0.4, 0.1], "still falling"),
        ([1.0, 1.1, 1.0, 1.1], "cycles"),
    ):
        run = guide.Run(path, 3, np.array(distances))
        assert run.verdict == verdict


def test_the_frechet_distance():
    guide = load_script("guides/gan.py")
    random = np.random.default_rng(0)
    a, b = (m @ m.T for m in random.normal(size=(2, 4, 4)))
    root = guide.square_root(a)
    np.testing.assert_allclose(root @ root, a, atol=1e-9)
    mean, other = random.normal(size=(2, 4))
    assert guide.frechet(mean, a, mean, a) == pytest.approx(0.0, abs=1e-6)
    # For covariances that commute: the difference of the roots.
    known = np.sum((mean - other) ** 2) + np.trace(a + 4 * a - 4 * a)
    assert guide.frechet(mean, a, other, 4 * a) == pytest.approx(known)
    assert guide.frechet(mean, a, other, b) == pytest.approx(
        guide.frechet(other, b, mean, a)
    )


def test_gan(tmp_path, capsys, monkeypatch):
    random = np.random.default_rng(0)
    arrays = {
        f"x_{part}": random.integers(0, 256, (128, 28, 28)).astype("uint8")
        for part in ("train", "test")
    }
    for part in ("train", "test"):
        arrays[f"y_{part}"] = random.integers(0, 10, 128).astype("uint8")
    np.savez(tmp_path / "fashion_mnist.npz", **arrays)
    guide = load_script("guides/gan.py")
    assert all(callable(make(1.0).apply) for make in guide.ARMS.values())
    assert set(guide.FACTORS) == set(guide.ARMS)
    assert set(guide.FACTORS.values()) <= set(guide.GRID)
    arms = {"ExtraAdam": guide.ARMS["ExtraAdam"]}  # one, for the time it takes
    monkeypatch.setattr(guide, "ARMS", arms)
    monkeypatch.setattr(guide, "BATCH", 8)
    monkeypatch.setattr(guide, "CYCLE", 2)
    monkeypatch.setattr(guide, "GRID", (2.0,))
    folder = str(tmp_path)
    small = ["--seeds", "2", "--gradients", "2", "--pieces", "1"]
    small += ["--width", "2", "--rows", "64", "--fakes", "100"]
    guide.main(
        ["--data", folder, "--output", folder, "--judge-epochs", "1", *small]
    )
    for name in ("measures", "samples"):
        picture = tmp_path / f"gan_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "gan.json").read_text())
    measures = np.array(numbers["measures"])
    assert measures.shape == (1, 2, 1, 2)
    assert np.isfinite(measures).all() and (measures[..., 0] > 0).all()
    assert len(np.unique(measures[..., 0])) == 2
    assert "Least on the way" in capsys.readouterr().out
    guide.main(
        ["--data", folder, "--tune", "--gradients", "2", "--pieces", "1"]
        + ["--width", "2", "--rows", "64", "--fakes", "100"]
        + ["--judge-epochs", "1"]
    )
    out = capsys.readouterr().out
    assert "held out" in " ".join(out.split()) and "ExtraAdam" in out
    with pytest.raises(SystemExit):
        guide.main(["--data", folder, "--gradients", "5"])
