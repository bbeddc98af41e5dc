"""SIGTERM and SIGINT during training: a step is never interrupted half-way.

    with Interrupts() as interrupts:      # signals raise `Interrupted` at once ...
        with interrupts.held():           # ... but in this block only
            step()
            interrupts.check()            # ... where it is checked for
            with interrupts.at_once():    # ... or in a part that may be given up half-way
                evaluate()

A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from runkey.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Signal handling of a training; without a `with` block around it, no signal is handled."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The one that has come; None: none."""
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Handle signals from here on, if this is the main thread: others cannot."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only remember a signal until the block ends or calls `check`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end this block, inside `held`."""
        self._held = False
        self.check()
        try:
            yield
        finally:
            self._held = True

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal = signal.Signals(number)
        # Not print: it may be what was interrupted.
        line = f"{self.signal.name}: stopping as soon as nothing is lost; again ends it at once\n"
        os.write(2, line.encode())
        if not self._held:
            self.check()
