"""What the site's build does beside MkDocs: the navigation, and formulas.

Formulas become MathML, which browsers draw: no page needs a script or a
network for them.
"""

import html
import json
import pathlib
import re

import latex2mathml.converter

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
# Commands that the converter does not know, or not in front of each other.
_WORDS = {
    r"\arg\min": r"\operatorname{argmin}",
    r"\Big": "",
    r"\|": r"\Vert ",
}


def on_config(config):
    """The navigation that `build.py` has written beside the pages."""
    pages = pathlib.Path(config["docs_dir"])
    config["nav"] = json.loads(pages.with_name("nav.json").read_text())
    return config


def on_page_content(content, **kwargs):
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(found):
    display = "block" if found[1] == "div" else "inline"
    # Without the brackets that mark it: \( \), \[ \].
    latex = html.unescape(found[2]).strip()[2:-2]
    for word, known in _WORDS.items():
        latex = latex.replace(word, known)
    mathml = latex2mathml.converter.convert(latex, display=display)
    if "\\" in mathml:
        raise ValueError(f"A command has no MathML in the formula {latex!r}")
    return f'<{found[1]} class="formula">{mathml}</{found[1]}>'
