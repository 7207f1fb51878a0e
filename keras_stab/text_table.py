"""Tables as text."""

import io

import rich.console
import rich.table


def as_text(columns, rows):
    """A plain table; a column is aligned to the right if its title says ">".

    Args:
        columns: Titles, `">name"` for a column of numbers.
        rows: Iterable of rows of strings.
    """
    table = rich.table.Table(box=None, pad_edge=False)
    for title in columns:
        table.add_column(
            title.removeprefix(">"),
            justify="right" if title.startswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    rich.console.Console(file=buffer, width=100).print(table)
    return buffer.getvalue().rstrip()
