"""For mkdocstrings: examples with `>>>` as code, not as quotations."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*?(?=\n[ \t]*\n|\Z)", re.S | re.M)


class ExamplesInDocstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                lambda found: f"```pycon\n{found[0]}\n```",
                obj.docstring.value,
            )
