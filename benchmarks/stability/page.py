"""Writes the page of the results, its details and its picture."""

import pathlib

import numpy as np

from stability import figures
from stability import grain_figures
from stability import titles

# With all that is written by hand; made anew are tables and counts.
TEMPLATE = pathlib.Path(__file__).with_name("page.txt")
MARKS = {
    "better": "**{}** ▲",
    "worse": "**{}** ▼",
    "steadier": "**{}** ▲",
    "less steady": "**{}** ▼",
}


def write(folder, guide):
    """Writes the guide, `details.md` beside the results, and the picture.

    Args:
        folder: Path of the files of results.
        guide: Path of the guide; its picture goes to `images` beside it.

    Returns:
        `guide`.
    """
    found = figures.read(folder)
    if not found:
        raise SystemExit(f"There are no results in {folder}.")
    tasks = {
        name: (results, figures.rows(results))
        for name, results in found.items()
    }
    guide.parent.mkdir(parents=True, exist_ok=True)
    picture = guide.parent / "images" / f"{guide.stem}.png"
    picture.parent.mkdir(exist_ok=True)
    from stability.picture import draw

    draw(tasks, picture)
    (folder / "details.md").write_text(details(tasks))
    text = TEMPLATE.read_text()
    for name, part in {
        "counts": counts(tasks),
        "means": summary(tasks, mean_cell),
        "spreads": summary(tasks, spread_cell),
        "orders": summary(of_orders(found), spread_cell),
        "verdicts": verdicts(tasks),
        "grain": grain_table(found),
        "picture": f"images/{picture.name}",
    }.items():
        text = text.replace(f"{{{{ {name} }}}}", part)
    guide.write_text(text)
    return guide


def of_orders(found):
    """As `tasks` of `write`, where only the order of the rows differs."""
    return {
        name: (results, figures.rows(results, "order"))
        for name, results in found.items()
        if "order" in results["spreads"]
    }


def counts(tasks):
    """How much was run, and how much of it is a result."""
    rows = [row for _, own in tasks.values() for row in own if row.comparison]
    means = [row.comparison.answers["mean"] for row in rows]
    spreads = [row.comparison.answers["spread"] for row in rows]
    seeds = {r["spreads"]["everything"]["seeds"] for r, _ in tasks.values()}
    return (
        f"{len(tasks)} tasks, {len(rows)} comparisons with the base on "
        f"{', '.join(map(str, sorted(seeds)))} paired seeds each. Means: "
        f"{means.count('better')} better, {means.count('worse')} worse, "
        f"{means.count('cannot tell')} where we cannot tell. Spread: "
        f"{spreads.count('steadier')} steadier, "
        f"{spreads.count('less steady')} less steady, "
        f"{spreads.count('cannot tell')} where we cannot tell."
    )


def summary(tasks, cell):
    """A table of arms (rows) and tasks (columns)."""
    if not tasks:
        return "Not run yet."
    arms = titles.arms_in(own for _, own in tasks.values())
    lines = [
        ["", *(results["title"] for results, _ in tasks.values())],
        ["base", *(base_cell(*own, cell) for own in tasks.values())],
    ]
    for arm in arms:
        line = [titles.short(arm)]
        for results, rows in tasks.values():
            own = [row for row in rows if row.arm == arm]
            line.append(cell(own[0], results) if own else "")
        lines.append(line)
    return table(lines)


def base_cell(results, rows, cell):
    base = rows[0]
    if cell is mean_cell:
        return number(base.mean)
    return f"± {number(base.deviation)}"


def mean_cell(row, results):
    answer = row.comparison.answers["mean"]
    text = signed(row.comparison.difference.value)
    return MARKS.get(answer, "{}").format(text)


def spread_cell(row, results):
    if row.comparison.ratio is None:
        return "-"
    answer = row.comparison.answers["spread"]
    text = number(row.comparison.ratio.value)
    return MARKS.get(answer, "{}").format(text)


def verdicts(tasks):
    """One line for each arm: where it helped, and where it harmed."""
    lines = [["", "better", "worse", "steadier", "less steady", "of", "cost"]]
    for arm in titles.arms_in(own for _, own in tasks.values()):
        rows = [r for _, own in tasks.values() for r in own if r.arm == arm]
        means = [row.comparison.answers["mean"] for row in rows]
        spreads = [row.comparison.answers["spread"] for row in rows]
        costs = sorted(row.cost for row in rows)
        lines.append(
            [
                titles.short(arm),
                *(str(means.count(a)) for a in ("better", "worse")),
                *(str(spreads.count(a)) for a in ("steadier", "less steady")),
                str(len(rows)),
                f"{costs[len(costs) // 2]:.2f}",
            ]
        )
    return table(lines)


def grain_table(found):
    """What GRAIN does during training, at the rate of the base."""
    lines = [GRAIN_HEADER]
    for results in found.values():
        own = results.get("grain")
        if not own:
            continue
        base = own["base"]
        for arm in own:
            if arm == "base":
                continue
            runs = own[arm]
            lines.append(
                [
                    f"{results['title']}: {titles.short(arm)}",
                    *(
                        number(np.mean([run[name] for run in runs]))
                        for name in grain_figures.FIGURES
                    ),
                    *(
                        number(
                            np.mean(
                                [a[name] / b[name] for a, b in zip(runs, base)]
                            )
                        )
                        for name in ("path", "distance")
                    ),
                ]
            )
    return table(lines) if len(lines) > 1 else "Not run yet."


GRAIN_HEADER = [
    "",
    "norm ratio",
    "groups with weight",
    "conflicts",
    "smallest cosine",
    "path, over the base's",
    "distance, over the base's",
]


def details(tasks):
    """All figures, one section for each task."""
    parts = [
        "# Figures of the stability benchmark\n\nMade by `python "
        "benchmarks/stability_study.py`. What the columns mean, and what "
        "follows: [Does it help?](../../../guides/does_it_help.md). A rate "
        "with an asterisk is at the edge of its search. In brackets: "
        "intervals that hold together with 95 % over the arms of a task.\n"
    ]
    for results, rows in tasks.values():
        parts.append(f"## {results['title']}\n\n{task_text(results)}\n")
        parts.append(table([HEADER, *(detail(row, results) for row in rows)]))
        if "order" in results["spreads"]:
            orders = figures.rows(results, "order")
            parts.append(
                "\nOnly the order of the rows differs "
                f"({results['spreads']['order']['seeds']} runs):\n"
            )
            parts.append(
                table([HEADER, *(detail(row, results) for row in orders)])
            )
    return "\n".join(parts)


HEADER = [
    "",
    "rate",
    "mean ± deviation",
    "difference",
    "ratio of deviations",
    "above floor",
    "bad tenth",
    "its difference",
    "failed",
    "disagree",
    "cost",
]


def task_text(results):
    floor = results["spreads"]["everything"]["arms"]
    floor = next(iter(floor.values()))["binomial_floor"]
    text = (
        f"{results['metric'].capitalize()} after {results['steps']} updates "
        f"of {results['base']}; rates {', '.join(map(str, results['grid']))}; "
        f"{results['backend']}, Keras {results['keras']}."
    )
    if floor is not None:
        text += (
            f" Another test set of this size moves the base's score by "
            f"{number(floor)} (standard deviation)."
        )
    return text


def detail(row, results):
    versus = row.comparison
    ratio = versus and versus.ratio
    return [
        titles.long(row.arm, results),
        f"{row.rate:g}" + ("*" if row.at_edge else ""),
        f"{number(row.mean)} ± {number(row.deviation)}",
        interval(*versus.difference, write=signed) if versus else "",
        interval(*ratio) if ratio else "",
        number(row.above_floor) if row.above_floor is not None else "",
        number(row.bad),
        interval(*row.bad_difference, write=signed)
        if row.bad_difference
        else "",
        str(row.failed),
        f"{100 * row.disagreement:.1f} %"
        if row.disagreement is not None
        else "",
        f"{row.cost:.2f}",
    ]


def number(value):
    """Three digits, as a person would write them."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def signed(value):
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def interval(value, low, high, write=number):
    return f"{write(value)} ({write(low)} to {write(high)})"


def table(lines):
    """A Markdown table, its first line the header."""
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
