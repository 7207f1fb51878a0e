"""The pages of `guides/`: complete, linked, and with figures that were read."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import callback_cases
import contract
import keras
import pytest
import support
from scripts import load_script

import keras_stab

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "guides"
CARDS = sorted((GUIDES / "cards").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(GUIDES.rglob("*.md"))]
METHODS = [
    name
    for name in keras_stab.__all__
    if inspect.isclass(thing := getattr(keras_stab, name))
    and issubclass(thing, keras.optimizers.Optimizer)
]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def section(page, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.S | re.M)[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_card(method):
    titles = [card.read_text().splitlines()[0] for card in CARDS]
    found = [title for title in titles if re.search(rf"\b{method}\b", title)]
    assert len(found) == 1
    assert f"`{method}" in (GUIDES / "how_to_choose.md").read_text()


def table(text):
    """The cells of a table, line by line."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    rows = table(section(text, "By symptom"))[2:]
    assert len(rows) == 8
    for _, code, card in rows:
        thing = eval(
            code.strip("`"), {"keras": keras, "keras_stab": keras_stab}
        )
        assert isinstance(thing, keras.optimizers.Optimizer)
        assert "guides/cards/" in card
    listed = [
        name
        for row in table(section(text, "Methods"))
        for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert sorted(listed) == sorted(METHODS)


def test_the_readme_changes_two_lines():
    """Its diff leads to what its script does."""
    text = (ROOT / "README.md").read_text()
    diff = re.search(r"```diff\n(.*?)```", text, re.S)[1].splitlines()
    assert [line[0] for line in diff] == ["+", "-", "+"]
    script = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert diff[0][1:] in script.splitlines()
    optimizers = re.search(r"optimizer=(.*), loss", diff[2])[1]
    assert optimizers.replace('"', "'") in script


def nested(outer, inner):
    return getattr(keras_stab, outer)(inner)


INNER = {
    "plain optimizer": lambda: "sgd",
    "`GRAIN`": lambda: keras_stab.GRAIN("sgd"),
    "`SAM`": lambda: keras_stab.SAM("sgd"),
    "`IRE`": lambda: keras_stab.IRE("sgd"),
    "`LARS`, `LAMB`": lambda: keras_stab.LARS(),
    "averages": lambda: keras_stab.WeightAveraging("sgd"),
}


def test_what_goes_with_what():
    """Each cell of the table is tried."""
    text = section(
        (GUIDES / "how_to_choose.md").read_text(), "What goes with what"
    )
    lines = table(text)
    assert lines[0][1:] == list(INNER)
    for outer, *cells in lines[2:]:
        for title, cell in zip(INNER, cells, strict=True):
            if cell.startswith("yes"):
                nested(outer.strip("`"), INNER[title]())
            else:
                with pytest.raises(ValueError):
                    nested(outer.strip("`"), INNER[title]())


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.stem)
def test_figures_of_a_card_are_those_of_the_benchmarks(card):
    text = card.read_text()
    for title in ("When not", "Cost", "Sharp edges", "Known negative results"):
        assert section(text, title).strip()
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    cost = section(text, "Cost")
    results = [
        (card.parent / target).read_text()
        for target in LINK.findall(cost)
        if target.endswith(".md")
    ]
    assert results
    for figure in re.findall(r"\b\d\.\d\d+\b", cost):
        assert any(figure in result for result in results), figure


def make_records():
    rows = {"A": dict.fromkeys(support.COLUMNS, "passed"), "B-2": {}}
    return {
        backend: {"backend": backend, "keras": "3", "rows": rows}
        for backend in support.BACKENDS
    }


def test_the_page_of_what_was_tested(tmp_path):
    """Every cell is filled; one without a test stops the command."""
    records = make_records()
    paths = [tmp_path / f"{backend}.json" for backend in records]

    def join():
        for path, record in zip(paths, records.values()):
            path.write_text(json.dumps(record) + "\n")
        output = tmp_path / "page.md"
        support.main([*map(str, paths), "--output", str(output)])
        return output.read_text()

    with pytest.raises(SystemExit, match="untested"):
        join()
    for record in records.values():
        record["rows"]["B-2"] = {
            **record["rows"]["A"],
            "accumulation": "refused",
        }
    for part in join().split("## Callbacks"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        cells = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in lines
        ]
        assert [line[0] for line in cells[2:]] == ["`A`", "`B-2`"]
        assert {len(line) for line in cells} == {len(cells[0])}
        assert all(cell for line in cells for cell in line)
    assert "| refused |" in join()
    paths.pop()
    with pytest.raises(SystemExit):
        join()


def test_the_page_names_every_method_and_no_gap():
    text = (GUIDES / "support.md").read_text()
    for bad in ("untested", "failed"):
        assert support.OUTCOMES[bad] not in text
    rows = [
        row.name
        for row in contract.ROWS
        if not row.nested
        and not any(helper in row.name for helper in support.HELPERS)
    ]
    for part in text.split("## Callbacks"):
        # Run `make support` after a change of the rows.
        listed = re.findall(r"^\| `([^`]+)` \|", part, re.M)
        assert listed == sorted(rows)


@pytest.mark.slow
def test_outcomes_of_a_session_are_recorded(tmp_path):
    """Through pytest itself, also from other processes."""
    record = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_contract.py", "-n", "1"]
        + ["-k", "config_round_trip and LARS and sgd"]
        + [f"--record-support={record}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    rows = json.loads(record.read_text())["rows"]
    assert rows == {
        name: {"save and resume": "passed"} for name in ("LARS", "TVLARS")
    }


def test_a_cell_is_the_worst_outcome():
    records = {
        backend: {"rows": {"A": {"accumulation": "passed"}}}
        for backend in support.BACKENDS
    }
    assert support.cell(records, "A", "accumulation") == "yes"
    assert "untested" in support.cell(records, "A", "frozen layers")
    records["jax"]["rows"]["A"]["accumulation"] = "refused"
    assert support.cell(records, "A", "accumulation") == "yes; JAX: refused"
    assert support.worst("passed", "failed", "refused") == "failed"
    assert (
        support.cell(records, "A", "`DataParallel` (JAX)")
        == (support.OUTCOMES["untested"])
    )


def test_the_checks_behind_the_columns_exist():
    names = re.findall(
        r"def (test_\w+)", (ROOT / "tests/test_contract.py").read_text()
    )
    for title, pattern in support.COLUMNS.items():
        for part in pattern.split("|"):
            name = part.split(r"\[")[0]
            assert any(re.match(name, each) for each in names), title


def test_every_callback_has_a_column():
    columns = support.KERAS_CALLBACKS + support.OWN_CALLBACKS
    assert columns == tuple(callback_cases.CHECKS)
    for name in callback_cases.CHECKS:
        test = f"test_callback[GRAIN-batches-{name}]"
        assert support.columns_of(test) == [f"`{name}`"]
    own = {
        name
        for name in keras_stab.__all__
        if inspect.isclass(thing := getattr(keras_stab, name))
        and issubclass(thing, keras.callbacks.Callback)
    }
    assert own == set(support.OWN_CALLBACKS)


def test_a_guide_becomes_a_page():
    build = load_script(Path("docs/build.py"))
    page = build.page_of_a_guide(GUIDES / "fine_tuning.py")
    assert page.startswith("# Fine-tuning a pretrained encoder with KerasHub")
    code = re.findall(r"```python\n(.*?)```", page, re.S)
    assert "class FineTuning" in "".join(code)
    for part in code:
        compile(part, "page", "exec")
    assert '"""\n##' not in page


def test_a_recipe_becomes_a_page(tmp_path):
    build = load_script(Path("docs/build.py"))
    path = tmp_path / "recipe.py"
    path.write_text('"""A recipe.\n\nWhat it *shows*.\n"""\n\nprint(1)\n')
    page = build.page_of_a_recipe(path)
    assert page == (
        "# A recipe\n\nWhat it *shows*.\n\n```python\nprint(1)\n```\n"
    )


def test_dead_links_are_found(tmp_path):
    pages = {
        "index.html": '<a href="a/b.html#here">x</a><a href="a/">y</a>'
        '<a href="https://keras.io/none">z</a><img src="no.png">',
        "a/b.html": '<h1 id="here">h</h1><a href="../index.html#gone">w</a>',
        "a/index.html": '<a href="#top">v</a>',
    }
    for name, page in pages.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(page)
    dead = load_script(Path("docs/dead_links.py")).dead_links(tmp_path)
    assert sorted(dead) == [
        "a/b.html: ../index.html#gone",
        "a/index.html: #top",
        "index.html: no.png",
    ]


def test_formulas_become_mathml():
    hooks = load_script(Path("docs/hooks.py"))
    page = (
        '<p>If <span class="arithmatex">\\(a \\le b\\)</span></p>'
        '<div class="arithmatex">\\[\\arg\\min_x f(x)\\]</div>'
    )
    drawn = hooks.on_page_content(page)
    assert drawn.count("<math") == 2 and "\\" not in drawn
    assert 'display="block"' in drawn and "argmin" in drawn
    unknown = '<span class="arithmatex">\\(\\nothing\\)</span>'
    with pytest.raises(ValueError, match="nothing"):
        hooks.on_page_content(unknown)


def test_the_reference_has_every_public_name_once():
    pages = load_script(Path("docs/build.py")).pages_of_reference()
    shown = [thing for page in pages.values() for thing in page.values()]
    namespaces = [
        getattr(keras_stab, name)
        for name in keras_stab.__all__
        if inspect.ismodule(getattr(keras_stab, name))
    ]
    public = {
        id(thing)
        for module in [keras_stab, *namespaces]
        for name in module.__all__
        if not inspect.ismodule(thing := getattr(module, name))
    }
    assert len(shown) == len(public)
    assert {id(thing) for thing in shown} == public
    assert "keras_stab.constraints.Simplex" in pages["Constraints"]
    assert "keras_stab.games.polar" in pages["Games"]
    assert "keras_stab.schedules.LinearWarmup" in pages["Schedules"]
    assert len({title.split()[0] for title in pages}) == len(pages)


def test_make_runs_every_guide():
    listed = re.search(
        r"^GUIDES := (.*?)^\w", (ROOT / "Makefile").read_text(), re.S | re.M
    )[1]
    names = {word.split(":")[0] for word in listed.split() if word != "\\"}
    assert names == {
        path.stem
        for path in GUIDES.glob("*.py")
        if path.read_text().startswith('"""\nTitle:')
    }
