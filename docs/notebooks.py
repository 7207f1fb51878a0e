"""Makes notebooks from recipes: `python docs/notebooks.py`.

The docstring of a script becomes the first cell; all imports are one cell, and
so are statements between blank lines at the top level. The tests compare the
files with what is made from the scripts today, and run the cells.
"""

import ast
import inspect
import json
import pathlib

RECIPES = pathlib.Path(__file__).parents[1] / "guides" / "recipes"
IMPORTS = (ast.Import, ast.ImportFrom)
NAMES = ("conditional_gan", "resume_after_crash")


def cells(source):
    """The title and text of a script, and the code of its cells."""
    first, *statements = ast.parse(source).body
    title, _, text = inspect.cleandoc(first.value.value).partition("\n\n")
    lines = source.splitlines()
    codes, end, imports = [], first.end_lineno, False
    for statement in statements:
        # With the comments above it.
        code = lines[end : statement.end_lineno]
        new = not code[0].strip()
        code = "\n".join(code).strip("\n")
        was, imports = imports, isinstance(statement, IMPORTS)
        if was and imports:
            codes[-1] += ("\n\n" if new else "\n") + code
        elif new:
            codes.append(code)
        else:
            codes[-1] += "\n" + code
        end = statement.end_lineno
    return f"# {title}\n\n{text}", codes


def notebook(source):
    """The text of a notebook file made from the source of a script."""
    text, codes = cells(source)
    made = [_cell(0, "markdown", text)]
    for i, code in enumerate(codes, 1):
        made.append(
            {**_cell(i, "code", code), "execution_count": None, "outputs": []}
        )
    content = {
        "cells": made,
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(number, kind, text):
    return {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": text.splitlines(keepends=True),
    }


def main():
    for name in NAMES:
        source = (RECIPES / f"{name}.py").read_text()
        (RECIPES / f"{name}.ipynb").write_text(notebook(source))


if __name__ == "__main__":
    main()
