"""Gathers the pages and builds the site: `make docs`.

The README, the pages in `guides/` and the results of the benchmarks are
written as they read best in the repository. Here they become one site, with
the scripts of guides and recipes as pages and a reference made from the
docstrings, a page per object. The result is `build/docs/site/index.html`; any
warning is an error, and so is a link that leads nowhere.
"""

import ast
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")  # the quickest to import

import keras
from dead_links import dead_links

import keras_stab

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs" / "pages"
STARTING = ("installing",)
# Pages and guides on how to tell whether something helps.
MEASURING = ("did_it_help", "does_it_help", "measuring", "diagnostics")
KINDS = {
    "Optimizers": keras.optimizers.Optimizer,
    "Schedules": keras.optimizers.schedules.LearningRateSchedule,
    "Callbacks": keras.callbacks.Callback,
    "Functions and other classes": object,
}


def gather():
    """Copies what is linked to, in the places where the links look."""
    shutil.rmtree(PAGES.parent, ignore_errors=True)
    for pattern in (
        "guides/**/*.md",
        "guides/images/*.png",
        "guides/recipes/*.ipynb",
        "benchmarks/**/*.md",
        "benchmarks/**/*.json",
    ):
        for path in ROOT.glob(pattern):
            _write(path.relative_to(ROOT), path.read_bytes())
    _write("site.css", (ROOT / "docs/site.css").read_bytes())
    _write("index.md", (ROOT / "README.md").read_bytes())
    _write("changes.md", (ROOT / "CHANGELOG.md").read_bytes())
    for path in sorted((ROOT / "guides").glob("*.py")):
        name = path.relative_to(ROOT)
        if path.read_text().startswith('"""\nTitle:'):
            _write(name.with_suffix(".md"), page_of_a_guide(path).encode())
    for path in sorted((ROOT / "guides/recipes").glob("*.py")):
        name = path.relative_to(ROOT)
        _write(name.with_suffix(".md"), page_of_a_recipe(path).encode())
    for path in PAGES.rglob("*.md"):
        path.write_text(_with_links_into_the_site(path))


def page_of_a_recipe(path):
    """A script with one docstring at its top: a text, then all of its code."""
    source = path.read_text()
    text = ast.get_docstring(ast.parse(source))
    title, _, text = text.partition("\n")
    code = source.split('"""', 2)[2].strip("\n")
    title = title.strip().rstrip(".")
    return f"# {title}\n\n{text.strip()}\n\n```python\n{code}\n```\n"


def page_of_a_guide(path):
    """The texts of a guide's script, and its code between them."""
    source = path.read_text()
    lines = source.splitlines()
    parts, code = [], []

    def end_of_code():
        if text := "\n".join(code).strip("\n"):
            parts.append(f"```python\n{text}\n```")
        code.clear()

    end = 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code += lines[end : node.lineno - 1]
            end_of_code()
            parts.append(inspect.cleandoc(node.value.value))
            end = node.end_lineno
    code += lines[end:]
    end_of_code()
    head = dict(line.split(": ", 1) for line in parts[0].splitlines())
    parts[0] = f"# {head['Title']}\n\n{head['Description']}"
    return "\n\n".join(parts) + "\n"


def write_reference():
    """A page for each public object, and a list of all of them."""
    cards = cards_of_methods()
    listed = ["# Reference"]
    for title, things in pages_of_reference().items():
        listed += ["", f"## {title}", "", "| name | what it is |", "|---|---|"]
        for path in sorted(things):
            name, thing = path.removeprefix("keras_stab."), things[path]
            page = _section(path, thing)
            if name in cards:
                page += f"\n\nWhen, when not, cost: [{name}]({cards[name]})\n"
            _write(f"reference/{name}.md", page.encode())
            line = (inspect.getdoc(thing) or "").partition("\n")[0]
            line = line.replace("|", r"\|")
            listed.append(f"| [`{name}`]({name}.md) | {line} |")
    _write("reference/index.md", "\n".join([*listed, ""]).encode())


def cards_of_methods():
    """The card of each method, from a page of the reference; links it there."""
    cards = {}
    for path in sorted((PAGES / "guides/cards").glob("*.md")):
        text = path.read_text()
        names = re.findall(r"\w+", text.partition("\n")[0])
        names = [name for name in names if hasattr(keras_stab, name)]
        links = [f"[`{name}`](../../reference/{name}.md)" for name in names]
        path.write_text(f"{text}\nReference: {', '.join(links)}\n")
        cards.update(dict.fromkeys(names, f"../guides/cards/{path.name}"))
    return cards


def write_navigation():
    """The order of the site; a page that is added finds its place."""

    def pages(pattern, first=()):
        found = sorted(p.relative_to(PAGES) for p in PAGES.glob(pattern))
        names = [str(path) for path in found]
        first = [name for name in first if name in names]
        return first + [name for name in names if name not in first]

    guides = pages("guides/*.md")
    scripts = [name for name in guides if not (ROOT / name).is_file()]
    choose, tested = "guides/how_to_choose.md", "guides/support.md"
    measuring = [g for g in guides if pathlib.Path(g).stem in MEASURING]
    starting = [g for g in guides if pathlib.Path(g).stem in STARTING]
    others = [choose, tested, *starting, *measuring]
    recipes = pages("guides/recipes/*.md", ["guides/recipes/README.md"])
    index = "reference/index.md"
    objects = [p for p in pages("reference/*.md") if p != index]
    results = "benchmarks/results/README.md"
    navigation = [
        {"Start": ["index.md", *starting]},
        {"How to choose": choose},
        {"Recipes": recipes + [g for g in guides if g not in scripts + others]},
        {"Methods": pages("guides/cards/*.md")},
        {"Measuring": measuring},
        {"Studies": [g for g in scripts if g not in others]},
        {"Reference": [index, *({pathlib.Path(p).stem: p} for p in objects)]},
        {"Tested": tested},
        {"Benchmarks": pages("benchmarks/**/*.md", [results])},
        {"Changes": "changes.md"},
    ]
    PAGES.with_name("nav.json").write_text(json.dumps(navigation))


def pages_of_reference():
    """By title of a page, the public things on it by their paths.

    What only a namespace offers is on the page that is called like it.
    """
    left = public_names(keras_stab)
    known = [id(thing) for thing in left.values()]
    pages = {}
    for title, kind in KINDS.items():
        names = [
            name
            for name, thing in left.items()
            if kind is object
            or (inspect.isclass(thing) and issubclass(thing, kind))
        ]
        pages[title] = {f"keras_stab.{n}": left.pop(n) for n in names}
    for namespace in keras_stab.__all__:
        module = getattr(keras_stab, namespace)
        if inspect.ismodule(module):
            things = {
                f"keras_stab.{namespace}.{name}": thing
                for name, thing in public_names(module).items()
                if id(thing) not in known
            }
            if things:
                pages.setdefault(namespace.capitalize(), {}).update(things)
    return pages


def public_names(module):
    """What a module offers by `__all__`, without other modules."""
    return {
        name: getattr(module, name)
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    }


def _section(path, thing):
    """A thing with the methods that it defines and documents itself."""
    members = [
        member
        for member, value in vars(thing).items()
        if inspect.isclass(thing)
        and not member.startswith("_")
        and getattr(value, "__doc__", None)
        and (callable(value) or isinstance(value, (property, classmethod)))
    ]
    options = f"\n    options:\n      members: {members}" if members else ""
    return f"::: {path}{options}"


def _with_links_into_the_site(path):
    """README and guides have other names here, and folders no page."""
    to_start = "../" * (len(path.relative_to(PAGES).parts) - 1)
    text = path.read_text().replace(
        f"]({to_start}README.md", f"]({to_start}index.md"
    )
    text = text.replace("](guides/cards)", "](guides/how_to_choose.md)")
    return re.sub(
        r"\]\(([\w/.]*)\.py\)",
        lambda found: (
            f"]({found[1]}.md)"
            if (path.parent / f"{found[1]}.md").is_file()
            else found[0]
        ),
        text,
    )


def _write(name, content):
    path = PAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main():
    gather()
    write_reference()
    write_navigation()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "docs" / "mkdocs.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet)
    if done.returncode:
        raise SystemExit("The site was not built: see the warnings above.")
    site = PAGES.with_name("site")
    if dead := dead_links(site):
        raise SystemExit("\n".join(["Links that lead nowhere:", *dead]))
    print(f"Site: {(site / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
