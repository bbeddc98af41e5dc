"""The log as MLflow is to have it: what was written to the file, read from there and sent on.

The file keeps what waits, however long MLflow is away, so nothing of it is kept in memory.  What is
sent is on the disk before: MLflow never has a value that the log could lose.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runkey.identity.record import RESUMED, RESUMED_AFTER
from runkey.tracking.backlog import MetricPoint
from runkey.tracking.lines import ALWAYS_NEW, Entry, parse_line, time_ms

_VALUES = 1000
"""In one piece: as many as MLflow takes at once."""
_MOST_TOLD = 100
_STEPS = 64
"""The last ones, whose metrics are remembered."""


@dataclass(slots=True)
class Piece:
    """Some lines on end, and what the tail knows behind them."""

    end: int
    """Byte behind them."""
    names: dict[int, frozenset[str]]
    """Metrics of the last steps."""
    resumed: tuple[str, ...]
    """The interruptions so far."""
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
    """Reads a log from where MLflow has it up to the end.

    Of a metric that a step has in two lines, its own and that of the epoch which it ends, MLflow
    gets the first: one value a step.
    """

    def __init__(self, path: Path, offset: int) -> None:
        """Nothing is read yet.

        Args:
            path: the log; it may not be there yet.
            offset: MLflow has the lines before this byte.
        """
        self._path = path
        size = path.stat().st_size if path.is_file() else 0
        # Shorter than what was sent: it was lost, and whatever is there now may be something else.
        self.offset = offset if offset <= size else 0
        self._names: dict[int, frozenset[str]] = {}
        self._resumed: tuple[str, ...] = ()
        if self.offset:
            self._remember()

    def next(self) -> Piece | None:
        """The lines at `offset`, some thousand values; None: there are no more yet."""
        piece = Piece(self.offset, dict(self._names), self._resumed)
        for line in self._lines():
            piece.end += len(line)
            if entry := parse_line(line):
                _add(piece, entry)
            if len(piece.points) >= _VALUES:
                break
        return piece if piece.end > self.offset else None

    def done(self, piece: Piece) -> None:
        """Go on behind a piece; until then `next` gives it again."""
        self.offset, self._names, self._resumed = piece.end, piece.names, piece.resumed

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

    def _remember(self) -> None:
        """Note what `done` would have left: interruptions, and the metrics of the last steps."""
        piece = Piece(self.offset, {}, ())
        last: deque[bytes] = deque(maxlen=2 * _STEPS)
        with self._path.open("rb") as file:
            position = 0
            for line in file:
                position += len(line)
                if position > self.offset:
                    break
                if b'"resumed"' in line:
                    _add(piece, parse_line(line) or {})
                last.append(line)
        for entry in filter(None, map(parse_line, last)):
            if "values" in entry:
                _add(piece, entry)
        self._names, self._resumed = piece.names, piece.resumed


def _add(piece: Piece, entry: Entry) -> None:
    """Add a line to a piece."""
    if "event" in entry:
        piece.tags[f"event.{entry['event']}"] = json.dumps(entry["fields"])
        if entry["event"] in ALWAYS_NEW:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
            piece.resumed += (f"step {entry['fields'].get('step')} at {when}",)
            piece.tags[RESUMED] = str(len(piece.resumed))
            piece.tags[RESUMED_AFTER] = "; ".join(piece.resumed[-_MOST_TOLD:])
    elif "values" in entry:
        step = entry["step"]
        before = piece.names.pop(step, frozenset())
        piece.names[step] = before | entry["values"].keys()
        if len(piece.names) > _STEPS:
            del piece.names[next(iter(piece.names))]
        piece.points += [point for point in points_of(entry) if point.name not in before]
