"""What waits in memory to be written to MLflow.  Filled by training, emptied by the writing thread.

The values of a training's log are not among it: they wait in the log itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

_MOST_METRICS = 200_000
"""Nothing that is logged here comes so often; if it does while MLflow is away, the oldest go."""


class MetricPoint(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    time_ms: int
    """Milliseconds since 1970."""
    step: int


class Backlog:
    """Values, tags and artifacts in order.  An item leaves only when it has been written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: deque[MetricPoint] = deque()
        self._first = 0
        self._dropped = 0
        self._tags: dict[str, str] = {}
        self._artifacts: deque[tuple[Path, str]] = deque()

    def add_metrics(self, values: Mapping[str, float], step: int, time_ms: int) -> int:
        """Append one step's values.  Returns how many values wait now."""
        points = [MetricPoint(name, float(v), time_ms, step) for name, v in values.items()]
        with self._lock:
            self._metrics.extend(points)
            while len(self._metrics) > _MOST_METRICS:
                self._pop()
                self._dropped += 1
            return len(self._metrics)

    def metrics(self, most: int) -> tuple[list[MetricPoint], int]:
        """The oldest values, at most that many, and the number to give to `metrics_done`."""
        with self._lock:
            points = list(islice(self._metrics, most))
            return points, self._first + len(points)

    def metrics_done(self, end: int) -> None:
        """Drop the values that `metrics` gave with this number."""
        with self._lock:
            while self._first < end:
                self._pop()

    def add_tag(self, name: str, value: str) -> None:
        """Set a tag, over an earlier value."""
        with self._lock:
            self._tags[name] = value

    def tags(self) -> dict[str, str]:
        """The tags that wait."""
        with self._lock:
            return dict(self._tags)

    def tags_done(self, written: Mapping[str, str]) -> None:
        """Drop tags, unless they were set to something else meanwhile."""
        with self._lock:
            for name, value in written.items():
                if self._tags.get(name) == value:
                    del self._tags[name]

    def add_artifact(self, path: Path, folder: str) -> None:
        """Append a file or folder."""
        with self._lock:
            self._artifacts.append((path, folder))

    def artifact(self) -> tuple[Path, str] | None:
        """The oldest artifact, or None; it stays until `artifact_done`."""
        with self._lock:
            return self._artifacts[0] if self._artifacts else None

    def artifact_done(self) -> None:
        """Drop the oldest artifact."""
        with self._lock:
            self._artifacts.popleft()

    def missing(self, values_elsewhere: int = 0) -> str:
        """What still waits, for people (`12 values and 2 artifacts`); empty if nothing does.

        Args:
            values_elsewhere: values that wait in the log.
        """
        with self._lock:
            return counted(
                (len(self._metrics) + self._dropped + values_elsewhere, "value"),
                (len(self._tags), "tag"),
                (len(self._artifacts), "artifact"),
            )

    def _pop(self) -> None:
        self._metrics.popleft()
        self._first += 1


def counted(*counts: tuple[int, str]) -> str:
    """`12 values and 2 artifacts`; what there is none of is left out."""
    return " and ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts if n)
