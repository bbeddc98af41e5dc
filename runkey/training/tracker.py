"""Where values of a training go, as far as the training knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes values and events.  Calls are cheap, buffered, and never raise."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name at an optimizer step."""

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened once: the device chosen, an early stop.

        What happens in a step has the field `step`.
        """

    def position(self) -> Mapping[str, int | str]:
        """Where the log is now, safe on disk up to there; for a checkpoint."""
        ...

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Go on where a checkpoint was taken.

        What the log holds after that place will be given once more, equal in all but times, and is
        not to be recorded twice.

        Args:
            position: what `position` gave then; None: training starts from its beginning.
        """


class Quiet:
    """A tracker that keeps nothing."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep nothing."""

    def event(self, kind: str, **fields: object) -> None:
        """Keep nothing."""

    def position(self) -> Mapping[str, int | str]:
        """Nowhere."""
        return {}

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Nothing to go on with."""


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

    def position(self) -> Mapping[str, int | str]:
        """See `Tracker.position`."""
        try:
            return self._tracker.position()
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)
            return {}

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """See `Tracker.resume`."""
        try:
            self._tracker.resume(position)
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = Quiet()
        self._say(f"tracking stopped, training goes on: {type(error).__name__}: {error}")
