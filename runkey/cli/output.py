"""What commands print: rich tables for people, JSON for scripts.

Exit codes: 0 yes or done, 1 an error, 2 a wrong command line, 3 the answer is no (`verify` found
faults, environments or runs differ).
"""

from __future__ import annotations

import io
import json
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NoReturn

import typer

from runkey.progress import WIDTH

NO = 3
"""Exit code of a command whose answer is no."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Key = Annotated[str, typer.Argument(help="Beginning of a key; KEY:RUN for one of its runs.")]


def print_json(value: Any) -> None:
    """Indented JSON on stdout; numbers that JSON does not have (nan, inf) are strings in it."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def answer_no() -> NoReturn:
    """End with the exit code of a no."""
    raise typer.Exit(NO)


def print_beside(label: str, text: str) -> None:
    """A label and a text, which goes on below itself where it is too long for a line."""
    lines = textwrap.wrap(
        text, WIDTH - len(label), break_long_words=False, break_on_hyphens=False
    ) or [""]
    for number, line in enumerate(lines):
        print((" " * len(label) if number else label) + line)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """A table without borders, at most as wide as the terminal (100 columns without one).

    Args:
        columns: headings.
        rows: as many cells each.
        right: headings of columns that are flush right, such as numbers.
        whole: headings of columns whose cells stay on one line, such as keys.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column in whole)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    text = io.StringIO()
    Console(width=WIDTH, highlight=False, file=text).print(table)
    for line in text.getvalue().splitlines():
        print(line.rstrip())  # Rich fills the last column up with spaces
