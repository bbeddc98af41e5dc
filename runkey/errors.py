"""The errors that users see: one base class, one line of text, exit code 1."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_KILLED = 128
"""Exit code of shells after a signal: this and its number."""
TRY_ELSEWHERE = os.EX_TEMPFAIL
"""Exit code 75, of a `StoppedError`."""


class RunkeyError(Exception):
    """Base of everything that a user can cause and mend."""

    exit_code = 1


class ParamsError(RunkeyError):
    """params.yaml is unreadable, or holds an unknown key, a wrong type or a value out of range."""


class DataError(RunkeyError):
    """The data set is missing something, or holds something that must not be trained on."""


class ModelError(RunkeyError):
    """A model cannot be built, or a weights file does not fit it."""


class TrainingError(RunkeyError):
    """Training cannot go on (non-finite losses, no data, nothing fits in memory)."""


class StoppedError(TrainingError):
    """Training cannot go on here and now; it can from where it stopped, elsewhere or later."""

    exit_code = TRY_ELSEWHERE


class EvaluationError(RunkeyError):
    """The metrics of an evaluation cannot be relied on."""


class RecipeError(RunkeyError):
    """The key of a stage cannot be made: something that enters it is missing or unreadable."""


class TrackingError(RunkeyError):
    """The tracking store cannot be reached or refuses what is written to it."""


class RegistryError(RunkeyError):
    """A run, a snapshot or a copy of one is not there, is damaged, or cannot be reached."""


class LockError(RunkeyError):
    """The locked environment cannot be read, or something that a command needs is not installed."""


class Interrupted(KeyboardInterrupt):
    """A signal asked a training to stop.  Like Ctrl-C, no `except Exception` catches it."""

    def __init__(self, number: signal.Signals, text: str = "") -> None:
        """Args: number: the signal.  text: where training stopped, and how to go on."""
        # Without a text: before the first step, or when the model was being recorded.
        default = (
            f"stopped by {number.name}; `dvc repro` goes on from the checkpoint, if there is one"
        )
        super().__init__(text or default)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As a shell has it after the signal."""
        return _KILLED + self.number


def report_early_interrupt() -> None:
    """Print Ctrl-C as one line, and exit with 130, also while an entry point is being imported."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt) or _wants_traceback():
            sys.__excepthook__(kind, error, trace)
            return
        os.write(2, b"interrupted\n")
        os._exit(_KILLED + signal.SIGINT)

    sys.excepthook = hook


def _wants_traceback() -> bool:
    return os.environ.get("RUNKEY_TRACEBACK") == "1" or "--traceback" in sys.argv


@contextmanager
def report_errors() -> Iterator[None]:
    """Print a `RunkeyError` as one line on stderr and exit with its code; after Ctrl-C with 130.

    On a terminal the line is folded at 100 columns; where it is piped it stays one, to be searched.
    `Interrupted` exits as a shell does: 143 after SIGTERM, 130 after SIGINT.

    The traceback is shown only when `RUNKEY_TRACEBACK=1` or `--traceback` is on the command line.
    """
    try:
        yield
    except (RunkeyError, OSError, KeyboardInterrupt) as error:
        # Imported here: until `report_early_interrupt` is called, Ctrl-C is a traceback.
        from runkey.progress import escaped, folded, say

        if _wants_traceback():
            raise
        line, code = str(error) or "interrupted", _KILLED + signal.SIGINT
        if isinstance(error, RunkeyError):
            line, code = f"error: {error}", error.exit_code
        elif isinstance(error, OSError):
            # Of a file that the command names or makes: a full disk, a missing right, a folder.
            place = f"{error.filename}: " if error.filename else ""
            line, code = f"error: {place}{error.strerror or error}", 1
        elif isinstance(error, Interrupted):
            code = error.exit_code
        line = escaped(line, newlines=True)
        say(*(folded(line) if sys.stderr.isatty() else [line]), stderr=True)
        raise SystemExit(code) from None
