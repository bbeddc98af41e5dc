"""What waits to be written to MLflow.  Filled by training, emptied by the writing thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple


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
        self._tags: dict[str, str] = {}
        self._artifacts: deque[tuple[Path, str]] = deque()

    def add_metrics(self, values: Mapping[str, float], step: int, time_ms: int) -> int:
        """Append one step's values.  Returns how many values wait now."""
        points = [MetricPoint(name, float(v), time_ms, step) for name, v in values.items()]
        with self._lock:
            self._metrics.extend(points)
            return len(self._metrics)

    def metrics(self, most: int) -> list[MetricPoint]:
        """The oldest values, at most that many; they stay until `metrics_done`."""
        with self._lock:
            return list(islice(self._metrics, most))

    def metrics_done(self, count: int) -> None:
        """Drop the `count` oldest values."""
        with self._lock:
            for _ in range(count):
                self._metrics.popleft()

    def add_tag(self, name: str, value: str) -> None:
        """Set a tag, over an earlier value."""
        with self._lock:
            self._tags[name] = value

    def tags(self) -> dict[str, str]:
        """The tags that wait."""
        with self._lock:
            return dict(self._tags)

    def tag_done(self, name: str, value: str) -> None:
        """Drop a tag, unless it was set to something else meanwhile."""
        with self._lock:
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

    def missing(self) -> str:
        """What still waits, for people (`12 values and 2 artifacts`); empty if nothing does."""
        with self._lock:
            counts = (
                (len(self._metrics), "value"),
                (len(self._tags), "tag"),
                (len(self._artifacts), "artifact"),
            )
        return " and ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts if n)
