"""The recipes: complete, short, and run with small settings."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from marks import ON_TORCH
from scripts import load_script
from sklearn import datasets
from test_keras_hub import make_classifier

import keras_stab

RECIPES = Path(__file__).parents[1] / "guides" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def with_settings(source, settings):
    """The source with other values of names like `EPOCHS`."""
    for name, value in settings.items():
        line = re.search(rf"^(.*\b{name}\b.*?) = (.*)$", source, re.M)
        names, values = line[1].split(", "), [line[2]]
        if len(names) > 1:
            values = line[2].split(", ")
        values[names.index(name)] = repr(value)
        changed = f"{line[1]} = {', '.join(values)}"
        source = source.replace(line[0], changed, 1)
    return source


@pytest.fixture
def run(capsys):
    """Runs a recipe: what it prints, and its variables."""

    def run(name, **settings):
        source = (RECIPES / f"{name}.py").read_text()
        variables = {"__name__": "__main__"}
        code = compile(with_settings(source, settings), name, "exec")
        exec(code, variables)
        return capsys.readouterr().out, variables

    return run


@pytest.fixture
def few_digits(monkeypatch):
    """The first 192 rows of scikit-learn's digits."""
    given = datasets.load_digits()
    x, y = given.data[:192], given.target[:192]

    def load_digits(return_X_y=False):
        return (x, y) if return_X_y else type(given)(data=x, target=y)

    monkeypatch.setattr(datasets, "load_digits", load_digits)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_short_and_listed(name):
    source = (RECIPES / f"{name}.py").read_text()
    assert len(source.splitlines()) < 60
    title, _, text = ast.get_docstring(ast.parse(source)).partition("\n\n")
    assert "\n" not in title
    assert "Printed: " in text and "CPU time" in " ".join(text.split())
    assert f"({name}.py)" in (RECIPES / "README.md").read_text()


def test_fine_tuning_noisy_rows(run, tmp_path):
    task = make_classifier()
    task.backbone.save_to_preset(tmp_path)
    task.preprocessor.save_to_preset(tmp_path)
    learning = ("transformer_layer_0", "pooled_dense")
    printed, variables = run(
        "fine_tuning_noisy_rows",
        EPOCHS=1,
        TOKENS=8,
        FOLDER=str(tmp_path),
        LEARNING=learning,
    )
    assert re.search(r"^[01]\.\d\d  what a delightful evening$", printed, re.M)
    layers = variables["backbone"].layers
    assert {each.name for each in layers if each.trainable} == set(learning)
    assert sum(variables["labels"]) == 8


def test_gan_from_two_optimizers(run):
    printed, variables = run("gan_from_two_optimizers", EPOCHS=1)
    assert "G_loss" in printed
    made = variables["maker"](np.random.normal(size=(64, 8)))
    assert made.shape == (64, 2)
    if keras.backend.backend() == "tensorflow":
        before = variables["Before"]()
        adam, points = variables["adam"], variables["points"][:128]
        before.compile(adam(1e-3), adam(1e-3))
        logs = before.fit(points, batch_size=64, verbose=0).history
        assert np.isfinite(logs["G_loss"]).all()


def test_conditional_gan(run, few_digits):
    printed, variables = run("conditional_gan", EPOCHS=2)
    assert "are read as the digit asked for" in printed
    steps = [
        int(o.iterations.numpy())
        for o in variables["game"].player_optimizers.values()
    ]
    assert steps == [4, 2]


def test_wgan_gp(run):
    printed, variables = run("wgan_gp", EPOCHS=1)
    assert "val_D_loss" in printed
    # The penalty works: without it the critic grows steeper for ever.
    assert 0.2 < variables["norms"].mean() < 2.0 if ON_TORCH else True


def test_find_wrong_labels(run, few_digits):
    printed, variables = run(
        "find_wrong_labels", SEEDS=1, ROWS=96, EPOCHS=(2, 4)
    )
    assert re.search(r"^4 epochs, chance 30%: gradients \d", printed, re.M)
    shares = variables["found"][4]
    assert all(0.0 <= share[0] <= 1.0 for share in shares.values())


def test_two_tasks(run, few_digits):
    printed, variables = run("two_tasks", SEEDS=2, ROWS=96, EPOCHS=2)
    assert "wrong digits, upgrad: " in printed
    assert printed.count("cannot tell") + printed.count("better") >= 4
    for wrong, unexplained in variables["results"].values():
        assert np.all(wrong < 100) and np.all(np.isfinite(unexplained))


def test_large_batch(run, monkeypatch):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (64, 28, 28)).astype("uint8")
    y = random.integers(0, 10, 64).astype("uint8")
    data = keras.datasets.fashion_mnist
    monkeypatch.setattr(data, "load_data", lambda: ((x, y), (x, y)))
    printed, variables = run("large_batch", BATCH=32, EPOCHS=1)
    assert "test accuracy: " in printed and variables["steps"] == 2


def test_applications_mixed_precision(run, few_digits, monkeypatch):
    if not ON_TORCH:  # compiling a network for two passes takes a minute

        def network(shape, **options):
            inputs = keras.Input(shape)
            x = keras.layers.Conv2D(4, 3, strides=4, use_bias=False)(inputs)
            x = keras.layers.BatchNormalization()(x)
            return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))

        monkeypatch.setattr(keras.applications, "MobileNet", network)
    printed, variables = run("applications_mixed_precision", ROWS=100, EPOCHS=1)
    assert "average: " in printed
    model = variables["model"]
    assert model.layers[1].compute_dtype == "bfloat16"
    assert isinstance(model.optimizer, keras_stab.WeightAveraging)
    assert int(model.optimizer.iterations.numpy()) == 2
    assert not model.optimizer.swapped


def test_own_training_loop(run):
    printed, variables = run("own_training_loop", EPOCHS=2)
    assert "average: " in printed
    optimizer = variables["optimizer"]
    assert int(optimizer.iterations.numpy()) == 8  # of 32 gradients
    trained = float(re.search(r"trained weights: ([\d.]+)", printed)[1])
    targets = variables["y"]
    assert trained < np.mean(np.square(targets))


def test_own_train_step(run, few_digits):
    printed, _ = run("own_train_step", EPOCHS=1)
    assert re.search(r"VAE has the loss \d", printed)
    assert re.search(r"Brighter has the loss \d", printed)
    assert "PlainGradients is refused" in printed


def test_resume_after_crash(run):
    printed, _ = run("resume_after_crash", EPOCHS=3)
    assert "crash: the machine went down" in printed
    assert printed.count("True") == 2 and "False" not in printed


# ---- Notebooks ------------------------------------------------------------

SMALL = {"conditional_gan": 1, "resume_after_crash": 3}


def test_notebooks(tmp_path):
    """They are what is made from the scripts today, and run cell by cell."""
    notebooks = load_script("docs/notebooks.py")
    assert set(notebooks.NAMES) == set(SMALL)
    programs = []
    for name, epochs in SMALL.items():
        text = (RECIPES / f"{name}.ipynb").read_text()
        made = notebooks.notebook((RECIPES / f"{name}.py").read_text())
        assert text == made, "run python docs/notebooks.py"
        cells = ["".join(c["source"]) for c in json.loads(text)["cells"]]
        assert cells[0].startswith("# ") and len(cells) > 4
        programs.append(
            [
                re.sub(r"^EPOCHS = \d+$", f"EPOCHS = {epochs}", c, flags=re.M)
                for c in cells[1:]
            ]
        )
    program = (
        "import json\n"
        "for codes in json.loads(input()):\n"
        "    names = {'__name__': '__main__'}\n"
        "    for code in codes: exec(code, names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        input=json.dumps(programs) + "\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "are read as the digit" in done.stdout
    assert done.stdout.endswith("average: True\ntrained weights: True\n")
