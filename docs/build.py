"""Gathers the pages and builds the site: `make docs`.

The README, the pages in `guides/` and the results of the benchmarks are
written as they read best in the repository. Here they become one site, with
the guides' scripts as pages and a reference made from the docstrings. The
result is `build/docs/site/index.html`; any warning is an error.
"""

import ast
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")  # the quickest to import

import keras

import keras_stab

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs" / "pages"
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
        "benchmarks/**/*.md",
        "benchmarks/**/*.json",
    ):
        for path in ROOT.glob(pattern):
            _write(path.relative_to(ROOT), path.read_bytes())
    _write("mathjax.js", (ROOT / "docs/mathjax.js").read_bytes())
    _write("index.md", (ROOT / "README.md").read_bytes())
    _write("changes.md", (ROOT / "CHANGELOG.md").read_bytes())
    for path in sorted((ROOT / "guides").glob("*.py")):
        if path.read_text().startswith('"""\nTitle:'):
            name = path.relative_to(ROOT)
            _write(name.with_suffix(".md"), page_of_a_guide(path).encode())
    for path in PAGES.rglob("*.md"):
        path.write_text(_with_links_into_the_site(path))


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
    """A page for each kind of public thing, and for each namespace."""
    for title, things in pages_of_reference().items():
        sections = [_section(path, things[path]) for path in sorted(things)]
        page = f"# {title}\n\n" + "\n\n".join(sections) + "\n"
        name = title.split()[0].lower()
        _write(f"reference/{name}.md", page.encode())


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
    """README and guides have other names here."""
    text = re.sub(r"\]\((\.\./)*README\.md", r"](\1index.md", path.read_text())
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
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "docs" / "mkdocs.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet)
    if done.returncode:
        raise SystemExit("The site was not built: see the warnings above.")
    site = PAGES.with_name("site") / "index.html"
    print(f"Site: {site.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
