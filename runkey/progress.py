"""How far a long step is: a bar on a terminal, a plain line now and then everywhere else.

    with progress("evaluate", len(images), "images") as steps:
        for image in images:
            ...
            steps.advance()

Both go to stderr, so that what a command answers can be piped.  The bar goes when the block ends:
the step itself logs what is worth keeping.  A step inside another one shows its progress there.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_SECONDS = 15.0
"""Between plain lines; a step that takes less says nothing without a terminal."""
WIDTH = 100
"""Columns that what is said may take."""
_BAR_CHARACTERS = 14

_wanted = True
_shown: list[_Bar] = []
"""The bar on the terminal now."""


class Steps(Protocol):
    """Told how far a step is."""

    def advance(self, amount: float = 1, text: str = "", what: str = "") -> None:
        """So much more is done.

        Args:
            amount: in the step's unit.
            text: to show beside the bar; the earlier one stays if it is empty.
            what: is done now, such as `epoch 3/20`; the earlier one stays if it is empty.
        """


def want_bars(wanted: bool) -> None:
    """Whether steps of this process may draw bars (`runtime.progress`); lines are said anyway."""
    global _wanted
    _wanted = wanted


@contextmanager
def progress(what: str, total: float, unit: str = "", *, lines: bool = True) -> Iterator[Steps]:
    """Show how far a step is until the block ends.

    Args:
        what: is done, such as `evaluate`.
        total: how much there is to do.
        unit: of `total`, such as `images`; `bytes` are shown as MB, none: percent.
        lines: whether plain lines are said where there is no terminal.
    """
    if not _has_terminal():
        yield _Lines(what, total, unit) if lines else QUIET
        return
    if _shown:
        outer = _shown[-1]
        before = outer.text
        try:
            yield _Inside(outer, what, total, unit)
        finally:
            outer.show(before)
        return
    with _rich_bars() as bars:
        bar = _Bar(bars, what, total, unit)
        _shown.append(bar)
        try:
            yield bar
        finally:
            _shown.remove(bar)


def each[T](what: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """The items one by one, with the progress of a loop over them."""
    with progress(what, len(items), unit) as steps:
        for item in items:
            yield item
            steps.advance()


def _has_terminal() -> bool:
    """Whether a bar can be drawn; rich may be missing on a bare GPU machine."""
    both = sys.stdout.isatty() and sys.stderr.isatty()
    return _wanted and both and find_spec("rich") is not None


def _rich_bars() -> Progress:
    """What draws a bar on the terminal while it is entered."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            """Nothing beside a text, which says it better."""
            return Text() if task.fields["text"] else super().render(task)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR_CHARACTERS),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[text]}"),
        TimeLeft(compact=True),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


class _Bar:
    """The one bar."""

    def __init__(self, bars: Progress, what: str, total: float, unit: str) -> None:
        self._bars, self._total, self._unit = bars, total, unit
        self._done = 0.0
        self.text = ""
        self._row = bars.add_task(what, total=total, amount=_amount(0, total, unit), text="")

    def advance(self, amount: float = 1, text: str = "", what: str = "") -> None:
        self._done += amount
        self._bars.update(
            self._row,
            completed=self._done,
            description=what or None,
            amount=_amount(self._done, self._total, self._unit),
        )
        if text:
            self.show(text)

    def show(self, text: str) -> None:
        self.text = text
        self._bars.update(self._row, text=text)


class _Inside:
    """A step within the one that has the bar."""

    def __init__(self, outer: _Bar, what: str, total: float, unit: str) -> None:
        self._outer, self._what, self._total, self._unit = outer, what, total, unit
        self._done = 0.0

    def advance(self, amount: float = 1, text: str = "", what: str = "") -> None:
        self._done += amount
        self._what = what or self._what
        self._outer.show(f"{self._what} {_amount(self._done, self._total, self._unit)}  {text}")


def _amount(done: float, total: float, unit: str) -> str:
    """`120/400 images`, `1.5/20.0 MB`, `35%`."""
    if unit == "bytes":
        return f"{done / 1e6:,.1f}/{total / 1e6:,.1f} MB"
    return f"{done:,.0f}/{total:,.0f} {unit}" if unit else f"{done / max(total, 1):.0%}"


class _Lines:
    """Says a line when it is time."""

    def __init__(self, what: str, total: float, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0.0
        self._last = time.monotonic()

    def advance(self, amount: float = 1, text: str = "", what: str = "") -> None:
        self._done += amount
        self._what = what or self._what
        if time.monotonic() - self._last >= EVERY_SECONDS and self._done < self._total:
            self._last = time.monotonic()
            line = f"{self._what}: {_amount(self._done, self._total, self._unit)}  {text}"
            sys.stderr.write(line.rstrip() + "\n")
            sys.stderr.flush()


class _Nothing:
    def advance(self, amount: float = 1, text: str = "", what: str = "") -> None:
        pass


QUIET: Steps = _Nothing()
"""Shows nothing."""


def log_to_terminal(*, stderr: bool = False) -> None:
    """Print the package's log messages; each entry point calls it once.

    The library says everything by `logging.getLogger(__name__)`. INFO is printed as it is,
    WARNING and above with the level's name in front; lines wider than 100 columns are folded.

    Args:
        stderr: print on stderr, for commands whose answer on stdout may be piped; else on stdout.
    """
    logger = logging.getLogger("runkey")
    for handler in [one for one in logger.handlers if isinstance(one, _TerminalHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_TerminalHandler(stderr))
    logger.setLevel(logging.INFO)


class _TerminalHandler(logging.Handler):
    """Writes to whatever `sys.stdout` or `sys.stderr` is when a message comes."""

    def __init__(self, stderr: bool) -> None:
        super().__init__()
        self._stderr = stderr

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        try:
            for line in folded(text):
                (sys.stderr if self._stderr else sys.stdout).write(line + "\n")
        except (OSError, ValueError):  # a closed pipe must not end a training
            self.handleError(record)


def tell(text: str) -> None:
    """Say lines to whoever watches a stage, none wider than 100 columns."""
    for line in folded(text):
        sys.stdout.write(line + "\n")


def folded(text: str) -> list[str]:
    """A text's lines; those wider than 100 columns go on below themselves, two columns in."""
    lines = []
    for line in text.splitlines():
        start = " " * (len(line) - len(line.lstrip()) + 2)
        parts = textwrap.wrap(
            line,
            WIDTH,
            subsequent_indent=start,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += parts or [""]
    return lines
