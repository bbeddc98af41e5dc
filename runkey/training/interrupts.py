"""SIGTERM and SIGINT while a model trains: a step is never cut in two.

    with Interrupts() as interrupts:      # signals raise `Interrupted` at once ...
        with interrupts.held():           # ... but here only
            step()
            interrupts.check()            # ... where it is asked for
            with interrupts.at_once():    # ... or in a part that may be given up half way
                evaluate()

A second signal ends the process at once, whatever it does.
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
    """Takes note of signals; without a `with` block around it, it never sees one."""

    def __init__(self) -> None:
        """Take note of nothing yet."""
        self.signal: signal.Signals | None = None
        """The one that came; None: none."""
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Handle signals from here on, if this is the main thread: others cannot."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Handle them as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only take note of a signal until the block ends, or asks."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside `held`: let a signal end this block."""
        self._held = False
        self.check()
        try:
            yield
        finally:
            self._held = True

    def each_at_once[T](self, items: Iterator[T]) -> Iterator[T]:
        """The same items; a signal ends the wait for one."""
        while True:
            with self.at_once():
                item = next(items, _END)
            if item is _END:
                return
            yield item

    def check(self) -> None:
        """Stop if a signal has come.

        Raises:
            Interrupted: it has.
        """
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


_END: Any = object()
