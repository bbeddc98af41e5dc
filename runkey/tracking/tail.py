"""The log as MLflow is to have it: what was written to the file, read from there and sent on.

The file keeps what waits, however long MLflow is away, so nothing of it is kept in memory.  What is
sent is on the disk before: MLflow never has a value that the log could lose.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runkey.identity.record import RESUMED, RESUMED_AFTER
from runkey.tracking.backlog import MetricPoint
from runkey.tracking.lines import ALWAYS_NEW, Entry, parse_line, time_ms

_VALUES = 1000
"""In one piece: as many as MLflow takes at once."""
_MOST_TOLD = 100


@dataclass(slots=True)
class Piece:
    """Some lines on end."""

    end: int
    """Byte behind them."""
    points: list[MetricPoint] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


def points_of(entry: Entry) -> list[MetricPoint]:
    """The values of a line of the log, as MLflow gets them."""
    time_stamp = time_ms(entry)
    return [
        MetricPoint(name, float(value), time_stamp, entry["step"])
        for name, value in entry["values"].items()
    ]


class LogTail:
    """Reads a log from where MLflow has it up to the end."""

    def __init__(self, path: Path, offset: int) -> None:
        """Nothing is read yet.

        Args:
            path: the log; it may not be there yet.
            offset: MLflow has the lines before this byte.
        """
        self._path = path
        self._resumed: list[str] = []
        size = path.stat().st_size if path.is_file() else 0
        # Shorter than what was sent: it was lost, and whatever is there now may be something else.
        self.offset = offset if offset <= size else 0
        if self.offset:
            self._remember(self.offset)

    def next(self) -> Piece | None:
        """The lines at `offset`, some thousand values; None: there are no more yet."""
        piece = Piece(self.offset)
        for line in self._lines():
            piece.end += len(line)
            if entry := parse_line(line):
                self._add(piece, entry)
            if len(piece.points) >= _VALUES:
                break
        return piece if piece.end > self.offset else None

    def left(self) -> int:
        """How many values are still to be sent."""
        if not self._path.is_file():
            return 0
        with self._path.open("rb") as file:
            file.seek(self.offset)
            return sum(len((parse_line(line) or {}).get("values", ())) for line in file)

    def _lines(self) -> Iterator[bytes]:
        """The whole lines from `offset` on that are on the disk."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            left = os.fstat(file.fileno()).st_size - self.offset
            file.seek(self.offset)
            for line in file:
                left -= len(line)
                if left < 0 or not line.endswith(b"\n"):
                    return
                yield line

    def _add(self, piece: Piece, entry: Entry) -> None:
        if "event" in entry:
            piece.tags[f"event.{entry['event']}"] = json.dumps(entry["fields"])
            if entry["event"] in ALWAYS_NEW:
                self._tell(entry)
                piece.tags |= self._resumed_tags()
        elif "values" in entry:
            piece.points += points_of(entry)

    def _remember(self, end: int) -> None:
        """Note the interruptions that MLflow has been told of."""
        with self._path.open("rb") as file:
            position = 0
            for line in file:
                position += len(line)
                if position > end:
                    return
                entry = parse_line(line) if b'"resumed"' in line else None
                if entry and entry.get("event") in ALWAYS_NEW:
                    self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
        self._resumed.append(f"step {entry['fields'].get('step')} at {when}")

    def _resumed_tags(self) -> dict[str, str]:
        told = self._resumed[-_MOST_TOLD:]
        return {RESUMED: str(len(self._resumed)), RESUMED_AFTER: "; ".join(told)}
