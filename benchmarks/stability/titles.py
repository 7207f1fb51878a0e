"""What tasks and arms are called in tables and in the picture."""

import textwrap

from stability.arms import ARMS


def short(arm):
    return ARMS[arm].title.format(base="base")


def long(arm, results):
    """The title of an arm, with the base optimizer's name."""
    return ARMS[arm].title.format(base=results["base"])


def task(results):
    """The title of a task, in lines as wide as its panel."""
    return textwrap.fill(results["title"], 24)


def arms_in(all_rows):
    """Keys of all arms but bases, in the order of the table of arms."""
    present = {row.arm for rows in all_rows for row in rows if row.comparison}
    return [arm for arm in ARMS if arm in present]
