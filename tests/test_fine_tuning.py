"""The guide to fine-tuning, with a tiny encoder and made-up reviews."""

import numpy as np
import pytest
from scripts import load_script
from test_keras_hub import make_classifier

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_reviews(folder):
    random = np.random.default_rng(0)
    for name in ("train", "dev"):
        lines = ["sentence\tlabel"]
        for i in range(40):
            words = ["good fine".split(), "bad poor".split()][i % 2]
            words = [*random.choice(words, 4), *("film play" * 2).split()]
            lines.append(f"{' '.join([*words, 'film', 'film'])} \t{1 - i % 2}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def guide():
    return load_script("guides/fine_tuning.py")


def test_rows_are_drawn_in_equal_parts(guide, tmp_path):
    write_reviews(tmp_path)
    (sentences, labels), (tests, _) = guide.load_data(tmp_path)
    assert len(sentences) == len(tests) == 40
    one, other = (
        guide.draw_rows(sentences, labels, 12, seed) for seed in (0, 1)
    )
    assert one[1].sum() == other[1].sum() == 6
    assert list(one[0]) != list(other[0])
    again = guide.draw_rows(sentences, labels, 12, 0)
    np.testing.assert_array_equal(one[0], again[0])


def test_missing_data_is_told(guide, tmp_path):
    with pytest.raises(SystemExit, match="There is no file"):
        guide.main(["--data", str(tmp_path)])
    (tmp_path / "train.tsv").write_text("text\tclass\na\t1\n")
    with pytest.raises(SystemExit, match="must have the columns"):
        guide.main(["--data", str(tmp_path)])


def test_tiny_run_reports_and_draws(guide, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guide, "TOKENS", 8)
    monkeypatch.setattr(guide, "RATE", 0.02)
    write_reviews(tmp_path)
    task = make_classifier()
    task.backbone.save_to_preset(tmp_path / "preset")
    task.preprocessor.save_to_preset(tmp_path / "preset")
    options = ["--data", str(tmp_path), "--model", str(tmp_path / "preset")]
    options += ["--rows", "16", "--epochs", "3", "--seeds", "2"]
    options += ["--folder", str(tmp_path / "runs"), "--test-rows", "12"]
    options += ["--output", str(tmp_path / "picture.png")]
    guide.main(options)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.split("accuracy (", 1)[1]
    for words in ("AdamW", "GRAIN(AdamW)", "paired seeds"):
        assert words in printed
    assert (tmp_path / "runs" / "report.json").is_file()
    # What is finished is not trained again.
    monkeypatch.setattr(guide.keras_hub.models, "BertTextClassifier", None)
    guide.main(options)
    assert capsys.readouterr().out.endswith(printed)
