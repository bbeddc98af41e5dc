"""Where values of a training go, as far as the training knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes values and events.  Calls are cheap, buffered, and never raise."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name at an optimizer step."""

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened once: the device chosen, an early stop."""


class Quiet:
    """A tracker that keeps nothing."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep nothing."""

    def event(self, kind: str, **fields: object) -> None:
        """Keep nothing."""


class Contained:
    """Passes everything on to a tracker until that one raises, then says so and goes on without it.

    Trackers promise never to raise; a broken promise may cost the log, but not the training.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        """Wrap `tracker`; `say` prints a line."""
        self._tracker: Tracker = tracker
        self._say = say

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        try:
            self._tracker.log(values, step)
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)

    def event(self, kind: str, **fields: object) -> None:
        """See `Tracker.event`."""
        try:
            self._tracker.event(kind, **fields)
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = Quiet()
        self._say(f"tracking stopped, training goes on: {type(error).__name__}: {error}")
