"""What commands share: the store of the current folder; tables for people, JSON for scripts.

Exit codes: 0 done or yes, 1 an error, 2 a wrong command line, 3 the answer is no (`verify` found
faults, environments or runs differ), 75 an error that may not come again elsewhere or later.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from typer import Argument, Exit, Option

from runkey import paths
from runkey.errors import RunkeyError
from runkey.files import json_safe
from runkey.identity import inputs
from runkey.identity.key import training_folders
from runkey.progress import WIDTH, escaped, say
from runkey.registry.claims import Claims, open_claims
from runkey.registry.library import Library, open_library
from runkey.tracking.store import find_store

workspace, checkout = paths.workspace, paths.store_root
"""The repository that the current folder is in; the main checkout, whatever the current folder."""
store = find_store

NO = 3
"""Exit code of a command whose answer is no."""
NO_BREAK = "\N{NO-BREAK SPACE}"
"""Printed by `print_beside` as a space at which no line ends."""

AsJson = Annotated[bool, Option("--json", help="Print JSON instead of text.")]
Key = Annotated[str, Argument(help="Prefix of a key; KEY:RUN for one of its runs.")]


def library(*, offline: bool = False) -> Library:
    """Return the runs of that store; `offline`: of a server that is down, those in the cache."""
    place = store()
    return open_library(place.uri, place.home, offline=offline)


def claims() -> Claims:
    """Return the claims of that store."""
    place = store()
    return open_claims(place.uri, place.home)


def tree_note(home: Path | None = None) -> str:
    """Say that run.json of the current folder's repository is of another key than its files.

    `home` is `Store.home`, where the answer is kept until a file changes; None: always look.
    """
    try:
        return inputs.tree_note(workspace(), home=home)
    except RunkeyError:  # outside a repository
        return ""


def trainings(key: str) -> list[Path]:
    """Return the folders beside that store of trainings whose key begins so, `rk2-` or not."""
    return training_folders(store().home, key)


def print_json(value: Any) -> None:
    """Print indented JSON; numbers that JSON lacks (nan, inf) become strings."""
    say(json.dumps(json_safe(value), indent=2, ensure_ascii=False, allow_nan=False))


Line = str | tuple[str, str]
"""A line, or a label and a text that is wrapped beside it."""


def print_answer(value: Any, *lines: Line, as_json: bool, yes: bool = True) -> None:
    """Print the value as JSON, or else the lines; exit with `NO` unless the answer is yes."""
    if as_json:
        print_json(value)
    for line in () if as_json else lines:
        if isinstance(line, str):
            say(escaped(line, newlines=True))
        else:
            print_beside(*line)
    if not yes:
        answer_no()


def answer_no() -> NoReturn:
    """Exit with `NO`."""
    raise Exit(NO)


def print_beside(label: str, text: str, *, stderr: bool = False) -> None:
    """Print a label and a text, which is wrapped beside the label."""
    lines = textwrap.wrap(
        text, WIDTH - len(label), break_long_words=False, break_on_hyphens=False
    ) or [""]
    for number, line in enumerate(lines):
        say((" " * len(label) if number else label) + line.replace(NO_BREAK, " "), stderr=stderr)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """Print a table without borders, as wide as the terminal (100 columns without one).

    `right` names the columns that are flush right, `whole` those whose cells stay on one line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column in whole)
    for row in rows:
        table.add_row(*(Text(escaped(cell, newlines=True)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        # Rich fills the last column up with spaces, and writes its own codes for bold.
        sys.stdout.write(f"{line.rstrip()}\n")
