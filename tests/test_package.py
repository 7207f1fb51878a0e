"""The shape of the package: public names, imports, docs that run."""

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import keras_stab

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "keras_stab").rglob("*.py"))
MODULES = [
    module.name
    for module in pkgutil.walk_packages(keras_stab.__path__, "keras_stab.")
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "guides").rglob("*.md"))]


def test_public_names():
    public = {name for name in vars(keras_stab) if not name.startswith("_")}
    packages = {
        "batch_norm",
        "batches",
        "callbacks",
        "diagnostics",
        "gradients",
        "keras_internals",
        "nesting",
        "numerics",
        "optimizers",
        "schedules",
        "swap_callbacks",
        "tables",
        "tail_schedules",
    }
    assert public - packages == {
        "AveragedSGD",
        "AveragedWeights",
        "CEGPlus",
        "ConstantTail",
        "ExtraGradient",
        "GRAIN",
        "Game",
        "IRE",
        "LAMB",
        "LARS",
        "Lookahead",
        "OptimisticGradient",
        "PastExtraGradient",
        "Player",
        "RAPP",
        "SAM",
        "StabilityMonitor",
        "StartBoostAtLoss",
        "ScheduleFree",
        "SwapSlowWeights",
        "TVLARS",
        "TimeVaryingSigmoid",
        "TrainStep",
        "WarmupCosine",
        "WarmupPolynomial",
        "WeightAveraging",
        "averaged_weights",
        "compare_scores",
        "constraints",
        "export_averaged",
        "games",
        "install",
        "loss_landscape",
        "min_norm_weights",
        "plot_loss_landscape",
        "reestimate_batch_norm",
        "register_layer_rule",
        "seeds_needed",
        "stability_report",
        "sharpness",
        "uninstall",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", keras_stab.__version__)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_imports(path):
    allowed_backends = path.name == "autodiff.py"
    area = path.parent.name
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert not module.startswith("keras.src")
        if top in ("tensorflow", "jax", "torch"):
            assert allowed_backends
        if area == "numerics":
            assert not module.startswith("keras_stab.") or (
                module.startswith("keras_stab.numerics")
            )
        if area == "gradients":
            assert not module.startswith("keras_stab.optimizers")


UNDERSCORE = re.compile(
    r"\b(?:model|layer|optimizer|variable|tensor|inner)\._[a-z]\w*"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_keras_internals_stay_in_one_place(path):
    if path.name != "keras_internals.py":
        assert not UNDERSCORE.findall(path.read_text())


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_public_things_have_an_example():
    for thing in (
        keras_stab.AveragedSGD,
        keras_stab.CEGPlus,
        keras_stab.ExtraGradient,
        keras_stab.GRAIN,
        keras_stab.Game,
        keras_stab.IRE,
        keras_stab.LAMB,
        keras_stab.LARS,
        keras_stab.Lookahead,
        keras_stab.OptimisticGradient,
        keras_stab.PastExtraGradient,
        keras_stab.RAPP,
        keras_stab.SAM,
        keras_stab.ScheduleFree,
        keras_stab.StabilityMonitor,
        keras_stab.TVLARS,
        keras_stab.WeightAveraging,
        keras_stab.loss_landscape,
        keras_stab.min_norm_weights,
        keras_stab.reestimate_batch_norm,
        keras_stab.sharpness,
    ):
        assert ">>>" in thing.__doc__
        for heading in ("Args:", "Departures from the paper:", "References:"):
            assert heading in thing.__doc__


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert snippets or page.stem == "support"
    scope = {"__name__": "page"}
    for snippet in snippets:
        exec(compile(snippet, page.name, "exec"), scope)
