"""Read a training's log (logs/train.jsonl) and the samples of the machine (logs/system.jsonl).

Any log can be read: one without a line, one that ends in the middle of a line, and one whose steps
are not in order (a training that was resumed with another `runtime.log_every`).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.errors import DataError

SAMPLES = "system.jsonl"
"""File beside the training's log: utilisation and memory of the machine, every few seconds."""

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps, and the values at them."""


@dataclass(frozen=True, slots=True)
class Point:
    """The values that were logged at one optimizer step."""

    step: int
    seconds: float
    """Since 1970."""
    values: dict[str, float]


@dataclass(slots=True)
class TrainingLog:
    """The log of one training."""

    steps: list[Point] = field(default_factory=list)
    """Every `runtime.log_every`-th optimizer step, in order."""
    epochs: list[Point] = field(default_factory=list)
    """The end of each epoch: means over the epoch, and the evaluation if there was one."""
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The last event of each kind."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of events of each kind."""
    event_steps: dict[str, set[int]] = field(default_factory=dict)
    """Optimizer steps of events, by their kind up to the first dot."""

    def add(self, entry: dict[str, Any]) -> None:
        """Add one more line of the log."""
        if isinstance(entry.get("values"), dict) and isinstance(entry.get("step"), int):
            self._add_values(_point(entry, entry["step"]))
            return
        kind = str(entry.get("event", entry.get("kind", "")))
        fields = self.events[kind] = entry.get("fields", entry)
        self.counts[kind] += 1
        if isinstance(fields, dict) and isinstance(fields.get("step"), int):
            self.event_steps.setdefault(kind.split(".")[0], set()).add(fields["step"])

    def of_steps(self, name: str) -> Series:
        """Return the steps at which a metric was logged, and its values."""
        return _series(self.steps, name)

    def of_epochs(self, name: str) -> Series:
        """Return the same of a metric that is logged when an epoch ends."""
        return _series(self.epochs, name)

    @property
    def last_step(self) -> int:
        """The last optimizer step that was logged; 0 before the first."""
        return max((points[-1].step for points in (self.steps, self.epochs) if points), default=0)

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps in one epoch; None before anything was logged."""
        for point in (*self.epochs, *self.steps):
            if point.values.get("train/epoch", 0) > 0:
                return point.step / point.values["train/epoch"]
        return None

    def best_step(self) -> int | None:
        """Return the step of the saved weights; of an unfinished run, the best so far."""
        end = self.events.get("training_end", {})
        if isinstance(end.get("best_step"), int):
            return int(end["best_step"])
        for name, sign in (("val/AP", 1), ("val/loss", -1)):
            steps, values = self.of_epochs(name)
            if np.isfinite(values).any():
                return int(steps[np.nanargmax(sign * values)])
        return None

    def _add_values(self, point: Point) -> None:
        names = point.values
        ends_epoch = "train/epoch_loss" in names or any(n.startswith("val/") for n in names)
        points = self.epochs if ends_epoch else self.steps
        place = bisect_left(points, point.step, key=lambda one: one.step)
        if place < len(points) and points[place].step == point.step:
            points[place] = Point(point.step, point.seconds, points[place].values | names)
        else:
            points.insert(place, point)


class GrowingLog:
    """The log of a running training, read on from where the last read ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = TrainingLog()
        self._offset = 0

    def update(self) -> bool:
        """Read the whole lines that were added; return True if there were any.

        A file that became shorter is a new one, and is read from its start.

        Raises:
            FileNotFoundError: there is no log.
        """
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self.log, self._offset = TrainingLog(), 0
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for entry in entries(whole.decode(errors="replace").splitlines()):
            self.log.add(entry)
        return bool(whole)


def read_log(path: Path) -> TrainingLog:
    """Read a training's log; DataError if there is none."""
    growing = GrowingLog(path)
    try:
        growing.update()
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro train` first") from None
    return growing.log


def read_samples(path: Path) -> list[Point]:
    """Read the samples of the machine in the order of time; `step` counts them.

    A training without MLflow takes no samples and writes no file: the list is empty.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [
        _point(entry, step)
        for step, entry in enumerate(entries(lines), start=1)
        if isinstance(entry.get("values"), dict) and "time" in entry
    ]


def gpu_names(samples: Sequence[Point], suffix: str) -> list[str]:
    """Return the metrics of each GPU with a suffix, such as `system/gpu_0_utilization_...`."""
    names = {name for sample in samples for name in sample.values}
    return sorted(n for n in names if n.startswith("system/gpu_") and n.endswith(suffix))


def entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a log, without lines that a crash cut short."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def number(value: object) -> float:
    """Return a float; NaN, a gap in a curve, for infinities and what is no number."""
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return result if math.isfinite(result) else math.nan


def _point(entry: dict[str, Any], step: int) -> Point:
    values = {name: number(value) for name, value in entry["values"].items()}
    return Point(step, number(entry.get("time")), values)


def _series(points: list[Point], name: str) -> Series:
    logged = [(point.step, point.values[name]) for point in points if name in point.values]
    steps, values = np.array(logged, dtype=np.float64).reshape(-1, 2).T
    return steps, values
