"""Hints while a training runs: a tracker that looks at the log at the end of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from runkey.plots.hints import CLASS_SCORES, EVENT, Hint, find_hints, told_hints
from runkey.plots.log import GrowingLog, read_samples


class Tracker(Protocol):
    """Where a training writes; `runkey.training.metrics.Tracker`, which training alone knows."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics."""

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened."""

    def position(self) -> dict[str, int | str]:
        """Where the record is now."""
        ...

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Go on from there."""


class HintingTracker:
    """Passes everything on; tells each kind of hint once, on the terminal and on the run.

    A training that was interrupted has its earlier hints in the log, and is not told them again.
    """

    def __init__(
        self,
        tracker: Tracker,
        log: Path,
        samples: Path,
        params: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            tracker: where everything goes.
            log: the JSONL file that it writes.
            samples: of the machine; need not be there.
            params: resolved parameters by dotted name.
            say: prints a line.
        """
        self._tracker, self._samples, self._params, self._say = tracker, samples, params, say
        self._growing = GrowingLog(log)
        self._scores: Mapping[str, Any] = {}
        self._looking = True

    def note_scores(self, scores: Mapping[str, Any]) -> None:
        """Take what an evaluation found of the classes; recorded with the epoch's metrics."""
        self._scores = scores

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics; those of an epoch's end are looked at."""
        self._tracker.log(values, step)
        if "train/epoch_loss" not in values:
            return
        if self._scores:
            self._tracker.event(CLASS_SCORES, step=step, **self._scores)
            self._scores = {}
        if self._looking:
            self._look(step)

    def event(self, kind: str, **fields: object) -> None:
        """See `Tracker`."""
        self._tracker.event(kind, **fields)

    def position(self) -> dict[str, int | str]:
        """See `Tracker`."""
        return self._tracker.position()

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """See `Tracker`."""
        self._tracker.resume(position)

    def _look(self, step: int) -> None:
        try:
            hints = self._hints()
        # A log that cannot be read, or a rule that stumbles over it: hints are not worth a log.
        except Exception as error:  # noqa: BLE001
            self._say(f"no more hints: {type(error).__name__}: {error}")
            self._looking = False
            return
        for hint in hints:
            for line in hint.lines:
                self._say(line)
            kind = f"{EVENT}{hint.kind}"
            self._tracker.event(kind, step=step, seen=hint.seen, change=hint.change)

    def _hints(self) -> list[Hint]:
        """Those that the log gives now and that the run was not told."""
        self._growing.update()
        told = {hint.kind for hint in told_hints(self._growing.log)}
        found = find_hints(self._growing.log, self._params, read_samples(self._samples))
        return [hint for hint in found if hint.kind not in told]
