"""logs/train.jsonl as series of numbers.

Reads what is there: a log that ends in the middle of a line, one without a line yet, and one whose
steps are not in order: a training that was resumed with another `runtime.log_every` adds steps
between those that were there.
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

# logs/system.jsonl: what the machine did while a training ran, sampled every few seconds.


SAMPLES = "system.jsonl"
"""Beside the training's log."""


def read_samples(path: Path) -> list[Point]:
    """The samples of the machine, in the order of time; `step` counts them.

    A training that records no MLflow run samples nothing and leaves no file: no samples.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [
        Point(step, number(entry["time"]), {n: number(v) for n, v in entry["values"].items()})
        for step, entry in enumerate(entries(lines), start=1)
        if isinstance(entry.get("values"), dict) and "time" in entry
    ]


def gpu_names(samples: Sequence[Point], ending: str) -> list[str]:
    """Names of the metrics of each GPU that end so, such as `system/gpu_0_utilization_...`."""
    names = {name for sample in samples for name in sample.values}
    return sorted(n for n in names if n.startswith("system/gpu_") and n.endswith(ending))


Series = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Point:
    """The values that were logged at one optimizer step."""

    step: int
    seconds: float
    """Since 1970."""
    values: dict[str, float]


@dataclass(slots=True)
class TrainingLog:
    """One training's log."""

    steps: list[Point] = field(default_factory=list)
    """Every `runtime.log_every`-th optimizer step, rising."""
    epochs: list[Point] = field(default_factory=list)
    """Every epoch's end: means over the epoch, and the evaluation if there was one."""
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The last event of each kind."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many events of each kind there are."""
    places: dict[str, set[int]] = field(default_factory=dict)
    """Optimizer steps of the events that say theirs, by kind without what follows a dot."""

    def add(self, entry: dict[str, Any]) -> None:
        """Take one more line of the log."""
        if isinstance(entry.get("values"), dict) and isinstance(entry.get("step"), int):
            self._add_values(entry)
        else:
            kind = str(entry.get("event", entry.get("kind", "")))
            fields = self.events[kind] = entry.get("fields", entry)
            self.counts[kind] += 1
            if isinstance(fields, dict) and isinstance(fields.get("step"), int):
                self.places.setdefault(kind.split(".")[0], set()).add(fields["step"])

    def of_steps(self, name: str) -> Series:
        """Steps, and the values that a metric had at them."""
        return _series(self.steps, name)

    def of_epochs(self, name: str) -> Series:
        """The same, of the values at the epochs' ends."""
        return _series(self.epochs, name)

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps in one epoch; None before anything was logged."""
        for point in (*self.epochs, *self.steps):
            if point.values.get("train/epoch", 0) > 0:
                return point.step / point.values["train/epoch"]
        return None

    def best_step(self) -> int | None:
        """The step whose weights were kept; of an unfinished run, the best AP (or loss) so far."""
        end = self.events.get("training_end", {})
        if isinstance(end.get("best_step"), int):
            return int(end["best_step"])
        for name, sign in (("val/AP", 1), ("val/loss", -1)):
            steps, values = self.of_epochs(name)
            if np.isfinite(values).any():
                return int(steps[np.nanargmax(sign * values)])
        return None

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended the training."""
        return "early stop" in str(self.events.get("training_end", {}).get("reason", ""))

    def _add_values(self, entry: dict[str, Any]) -> None:
        values = {name: number(value) for name, value in entry["values"].items()}
        point = Point(entry["step"], number(entry.get("time")), values)
        ends_epoch = "train/epoch_loss" in values or any(name.startswith("val/") for name in values)
        points = self.epochs if ends_epoch else self.steps
        place = bisect_left(points, point.step, key=lambda one: one.step)
        if place < len(points) and points[place].step == point.step:
            points[place] = Point(point.step, point.seconds, points[place].values | values)
        else:
            points.insert(place, point)


class GrowingLog:
    """A log that is still being written, read on from where it was."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.log = TrainingLog()
        self._offset = 0

    def update(self) -> bool:
        """Read the whole lines that were added; whether there were any.

        A file that became shorter is another one, and is read from its start.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self.log, self._offset = TrainingLog(), 0
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for entry in entries(whole.decode(errors="replace").splitlines()):
            self.log.add(entry)
        return bool(whole)


def read_log(path: Path) -> TrainingLog:
    """Read a training's log.

    Raises:
        DataError: there is no such file; says to train.
    """
    growing = GrowingLog(path)
    try:
        growing.update()
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro train` first") from None
    return growing.log


def entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log, without lines that a crash cut short."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that a crash cut short, wherever a resumed training went on after it
        if isinstance(entry, dict):
            yield entry


def number(value: object) -> float:
    """A float; NaN for infinities and for what is no number, so that curves have a gap there."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _series(points: list[Point], name: str) -> Series:
    have = [p for p in points if name in p.values]
    return (
        np.array([p.step for p in have], dtype=np.float64),
        np.array([p.values[name] for p in have], dtype=np.float64),
    )
