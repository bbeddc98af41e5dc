"""Progress of long steps: a bar on a terminal, periodic plain lines otherwise; and all output.

Bar and lines go to stderr, so that a command's answer can be piped.  The bar is erased when the
block ends; a step inside another one shows its progress in the other's bar.
"""

from __future__ import annotations

import logging
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_SECONDS = 15.0
"""Seconds between plain lines; a shorter step prints none."""
WIDTH = 100
"""Most columns of printed text."""
_BAR_CHARACTERS = 14

_wanted = True
_bars: Progress | None = None
"""What draws the bar that is on the terminal now."""


class Steps:
    """Counts how much of a step is done, and shows it."""

    def __init__(
        self, what: str, total: float, unit: str, show: Callable[[Steps], None] | None = None
    ) -> None:
        self.what, self.total, self._unit, self._show = what, total, unit, show
        self.done, self.text = 0.0, ""

    @property
    def amount(self) -> str:
        """`120/400 images`, `1.5/20.0 MB`, `35%`."""
        if self._unit == "bytes":
            return f"{self.done / 1e6:,.1f}/{self.total / 1e6:,.1f} MB"
        if self._unit:
            return f"{self.done:,.0f}/{self.total:,.0f} {self._unit}"
        return f"{self.done / max(self.total, 1):.0%}"

    def advance(self, amount: float = 1, text: str = "", what: str = "") -> None:
        """Add an amount, in the step's unit, to what is done.

        `what` is done now, such as `epoch 3/20`, with a text beside it; empty ones change nothing.
        """
        self.done += amount
        note_movement()
        text, what = escaped(text, newlines=True), escaped(what, newlines=True)
        self.text, self.what = text or self.text, what or self.what
        if self._show:
            self._show(self)


QUIET = Steps("", 0, "")
"""Shows nothing."""

# Whether the training of this process moves. A claim's beat stops when it does not.

_moved: float | None = None
"""When it last moved; None: no training is watched."""


@contextmanager
def movement_watched() -> Iterator[None]:
    """Watch, in the block, that steps are taken: each step, and each bar's advance, is noted."""
    global _moved
    _moved = time.monotonic()
    try:
        yield
    finally:
        _moved = None


def note_movement() -> None:
    """Note that something was done, if movement is watched."""
    global _moved
    if _moved is not None:
        _moved = time.monotonic()


def seconds_still() -> float:
    """Return the seconds since the last movement; 0 if it is not watched."""
    return 0.0 if (moved := _moved) is None else time.monotonic() - moved


def want_bars(wanted: bool) -> None:
    """Allow bars in this process or not (`runtime.progress`); lines are printed anyway."""
    global _wanted
    _wanted = wanted


@contextmanager
def progress(what: str, total: float, unit: str = "", *, lines: bool = True) -> Iterator[Steps]:
    """Show the progress of a step until the block ends.

    Args:
        what: name of the step, such as `evaluate`.
        total: how much there is to do.
        unit: of `total`, such as `images`; `bytes` are shown as MB, none: percent.
        lines: print plain lines where there is no terminal.
    """
    global _bars
    what = escaped(what, newlines=True)
    # rich may be missing on a bare GPU machine.
    terminal = sys.stdout.isatty() and sys.stderr.isatty() and find_spec("rich") is not None
    if not (_wanted and terminal):
        yield Steps(what, total, unit, _line_printer() if lines else None)
    elif _bars:
        outer, task = _bars, _bars.tasks[0]
        before = task.fields["text"]

        def show_inside(now: Steps) -> None:
            outer.update(task.id, text=f"{now.what} {now.amount}  {now.text}")

        try:
            yield Steps(what, total, unit, show_inside)
        finally:
            outer.update(task.id, text=before)
    else:
        with _rich_bars() as bars:
            row = bars.add_task(what, total=total, amount=Steps(what, total, unit).amount, text="")

            def show(now: Steps) -> None:
                fields: dict[str, Any] = {"amount": now.amount, "text": now.text}
                bars.update(row, completed=now.done, description=now.what, **fields)

            _bars = bars
            try:
                yield Steps(what, total, unit, show)
            finally:
                _bars = None


def each[T](what: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """Yield the items one by one, with the progress of a loop over them."""
    with progress(what, len(items), unit) as steps:
        for item in items:
            yield item
            steps.advance()


def _line_printer() -> Callable[[Steps], None]:
    last = time.monotonic()

    def show(now: Steps) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY_SECONDS and now.done < now.total:
            last = time.monotonic()
            sys.stderr.write(f"{now.what}: {now.amount}  {now.text}".rstrip() + "\n")
            sys.stderr.flush()

    return show


def _rich_bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            """Show nothing beside a text, which says it better."""
            return Text() if task.fields["text"] else super().render(task)

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR_CHARACTERS),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[text]}", markup=False),
        TimeLeft(compact=True),
        console=Console(stderr=True),
        transient=True,
    )


class _TerminalHandler(logging.Handler):
    """Writes to whatever `sys.stdout` or `sys.stderr` is when a message comes."""

    stderr = False

    def emit(self, record: logging.LogRecord) -> None:
        text = escaped(record.getMessage())
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        try:
            for line in folded(text):
                (sys.stderr if self.stderr else sys.stdout).write(line + "\n")
        except (OSError, ValueError):  # a closed pipe must not end a training
            self.handleError(record)


_TERMINAL = _TerminalHandler()


def log_to_terminal(*, stderr: bool = False) -> None:
    """Print the package's log messages; each entry point calls it.

    Every module logs with `logging.getLogger(__name__)`. INFO is printed as it is, WARNING and
    above with the level's name in front; lines wider than 100 columns are folded.

    Args:
        stderr: print on stderr, for commands whose answer on stdout may be piped; else on stdout.
    """
    _TERMINAL.stderr = stderr
    logger = logging.getLogger("runkey")
    logger.addHandler(_TERMINAL)
    logger.setLevel(logging.INFO)


def folded(text: str) -> list[str]:
    """Split a text into lines of at most 100 columns; continued lines are indented by two more."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return lines


# What others wrote, and what must not be shown, on its way to the terminal.

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1: ANSI sequences begin so
    "\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, separators
    "\ud800-\udfff\U000e0000-\U000e007f]"  # half characters, invisible tags
)
# A user without a password may be a token of git's over HTTP; of ssh it is a name.
_LOGIN = re.compile(
    r"(?<=://)[^\s/@]*:(?!\d+(?:[/?#\s]|$))\S*@|(?:(?<=http://)|(?<=https://))[^\s/@]+@"
)


def without_logins(text: str) -> str:
    """Remove `user:password@` from every address in a text."""
    return _LOGIN.sub("", text)


def escaped(text: str, *, newlines: bool = False) -> str:
    """Return a text that a terminal shows as it is, without logins.

    Control characters, those that change the direction of text and half characters become JSON's
    escapes, which are also right inside JSON; with `newlines` line ends do, too.
    """
    shown = _CONTROL.sub(_as_escape, without_logins(text))
    return shown.replace("\n", "\\n") if newlines else shown


def _as_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass").hex(" ", 2).split()
    return "".join(f"\\u{unit}" for unit in units)


def say(*lines: str, stderr: bool = False) -> None:
    """Print lines, `escaped`; every text that is printed and not logged goes through here."""
    for line in lines or ("",):
        print(escaped(line), file=sys.stderr if stderr else sys.stdout)
