"""The shape of the package: public names, imports, docs that run."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import keras
import pytest

import keras_stab

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "keras_stab").rglob("*.py"))
MODULES = [
    module.name
    for module in pkgutil.walk_packages(keras_stab.__path__, "keras_stab.")
]


def file_name(path):
    return str(path.relative_to(ROOT / "keras_stab").with_suffix(""))


PAGES = [ROOT / "README.md", *sorted((ROOT / "guides").rglob("*.md"))]
# Each of its snippets is for one backend; `test_many_devices.py` runs them.
PAGES.remove(ROOT / "guides" / "many_devices.md")


NAMESPACES = {
    "callbacks": keras.callbacks.Callback,
    "constraints": None,
    "diagnostics": None,
    "games": None,
    "methods": None,
    "optimizers": keras.optimizers.Optimizer,
    "schedules": keras.optimizers.schedules.LearningRateSchedule,
}


def test_public_names():
    assert sorted(keras_stab.__all__) == [
        "AdaptiveClipping",
        "Aggregate",
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
        "RecoverFromSpikes",
        "SAM",
        "ScheduleFree",
        "StabilityMonitor",
        "StartBoostAtLoss",
        "SwapSlowWeights",
        "TVLARS",
        "TimeVaryingSigmoid",
        "TrainStep",
        "WarmupCosine",
        "WarmupPolynomial",
        "WeightAveraging",
        "averaged_weights",
        "callbacks",
        "compare_scores",
        "constraints",
        "diagnostics",
        "export_averaged",
        "games",
        "group_gradients",
        "install",
        "loss_landscape",
        "methods",
        "min_norm_weights",
        "optimizers",
        "plot_loss_landscape",
        "reestimate_batch_norm",
        "register_layer_rule",
        "return_trained_weights",
        "schedules",
        "seeds_needed",
        "sharpness",
        "stability_report",
        "uninstall",
    ]
    assert re.fullmatch(r"\d+\.\d+\.\d+", keras_stab.__version__)


def test_only_public_names_are_offered():
    """What a tab completes, here and in every namespace."""
    assert dir(keras_stab) == sorted([*keras_stab.__all__, "__version__"])
    for name in NAMESPACES:
        namespace = getattr(keras_stab, name)
        assert dir(namespace) == sorted(namespace.__all__)
        assert all(hasattr(namespace, each) for each in namespace.__all__)


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_namespace_holds_what_is_public_at_the_top(name):
    namespace, kind = getattr(keras_stab, name), NAMESPACES[name]
    for each in namespace.__all__:
        if each in keras_stab.__all__:
            assert getattr(keras_stab, each) is getattr(namespace, each)
    if kind is not None:
        public = {n: getattr(keras_stab, n) for n in keras_stab.__all__}
        assert {
            n
            for n, thing in public.items()
            if inspect.isclass(thing) and issubclass(thing, kind)
        } <= set(namespace.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_no_name_hides_a_module(name):
    """`import keras_stab.x.y` gives the module of that name."""
    found = keras_stab
    importlib.import_module(name)
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert found is sys.modules[name]


# What stands higher may import what stands lower, subfolders included, and no
# other way round. Two rooms of one floor know nothing of each other, but for
# those of the ground floor.
FLOORS = [
    {
        "_version",
        "arguments",
        "batches",
        "memory",
        "nesting",
        "numerics",
        "object_arguments",
        "registration",
        "text_table",
        "types",
    },
    {"backend", "constraints", "schedules"},
    {"keras_internals"},
    {"batch_norm", "gradients"},
    {"trainer"},
    {"diagnostics", "optimizers"},
    {"evaluation", "games", "methods"},
    {"callbacks"},
    {"__init__"},
    {"__main__"},
]
# These know less than their floor allows.
KNOWS_ONLY = {"numerics": {"numerics"}, "backend": {"backend", "numerics"}}


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path):
    return path.relative_to(ROOT / "keras_stab").with_suffix("").parts[0]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in SOURCES}
    assert rooms == set.union(*FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=file_name)
def test_imports_run_downwards(path):
    room = room_of(path)
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        assert not module.startswith("keras.src")
        if top in ("tensorflow", "jax", "torch"):
            assert room == "backend"
        if top != "keras_stab":
            continue
        below = rest.split(".")[0] or "__init__"
        if below not in set.union(*FLOORS):  # a public name
            below = "__init__"
        if room in KNOWS_ONLY:
            assert below in KNOWS_ONLY[room], module
        ground = floor_of(room) == floor_of(below) == 0
        assert room == below or ground or floor_of(below) < floor_of(room), (
            module
        )


NAME_OF_A_BACKEND = re.compile(
    r"\bBACKEND\b|backend\.backend\(|"
    r"[\"'](?:tensorflow|jax|torch)[\"']"
)


@pytest.mark.parametrize("path", SOURCES, ids=file_name)
def test_backends_are_named_in_one_place(path):
    if room_of(path) != "backend":
        assert not NAME_OF_A_BACKEND.findall(path.read_text())


def test_rooms_are_small():
    lengths = sorted(len(p.read_text().splitlines()) for p in SOURCES)
    assert lengths[-1] <= 400
    assert sum(length > 300 for length in lengths) <= 5


UNDERSCORE = re.compile(
    r"\b(?:model|layer|optimizer|variable|tensor|inner)\._[a-z]\w*"
)


@pytest.mark.parametrize("path", SOURCES, ids=file_name)
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
        keras_stab.AdaptiveClipping,
        keras_stab.Aggregate,
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
        keras_stab.RecoverFromSpikes,
        keras_stab.SAM,
        keras_stab.ScheduleFree,
        keras_stab.StabilityMonitor,
        keras_stab.TVLARS,
        keras_stab.WeightAveraging,
        keras_stab.group_gradients,
        keras_stab.loss_landscape,
        keras_stab.min_norm_weights,
        keras_stab.reestimate_batch_norm,
        keras_stab.sharpness,
    ):
        assert ">>>" in thing.__doc__
        for heading in ("Args:", "Departures from the paper:", "References:"):
            assert heading in thing.__doc__


def public_functions():
    """Public functions, and the methods of public classes that are ours."""
    spaces = [keras_stab, *(getattr(keras_stab, n) for n in NAMESPACES)]
    things = [getattr(s, name) for s in spaces for name in s.__all__]
    for thing in things:
        if inspect.isfunction(thing):
            yield thing
        bases = inspect.getmro(thing) if inspect.isclass(thing) else ()
        for base in bases:
            if base.__module__.startswith("keras_stab"):
                yield from methods_of(base)


def methods_of(kind):
    for name, member in vars(kind).items():
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if isinstance(member, property):
            yield from filter(None, (member.fget, member.fset))
        else:
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member):
                yield member


def test_public_signatures_are_annotated():
    missing = []
    for function in public_functions():
        signature = inspect.signature(function)
        if signature.return_annotation is signature.empty:
            if function.__name__ != "__init__":
                missing.append(f"{function.__qualname__}: return")
        for name, parameter in signature.parameters.items():
            if name in ("self", "cls"):
                continue
            if parameter.annotation is parameter.empty:
                missing.append(f"{function.__qualname__}: {name}")
    assert not missing


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    # Tables that are generated, and the index of the recipes, whose scripts
    # have tests of their own.
    without = ("support", "does_it_help")
    assert snippets or page.stem in without or page.parent.name == "recipes"
    scope = {"__name__": "page"}
    for snippet in snippets:
        exec(compile(snippet, page.name, "exec"), scope)
