"""Read a training's log (logs/train.jsonl) and the samples of the machine beside it.

Any log can be read: one without a line, one that ends in the middle of a line, and one whose steps
are not in order (a training that was resumed with another `runtime.log_every`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runkey.errors import DataError
from runkey.files import open_plain, parse_json

_MOST_STEPS, _LATEST = 1e12, 1e11
SAMPLES = "system.jsonl"
"""Utilisation and memory of the machine, every few seconds; a training without MLflow has none."""

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps, and the values at them."""


class Point(NamedTuple):
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
    samples: list[Point] = field(default_factory=list)
    """Of the machine, in the order of time; `step` counts them."""
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The fields of all events, by their kind."""

    def add(self, entry: dict[str, Any]) -> None:
        """Add one more line of the log."""
        if isinstance(entry.get("values"), dict):
            if _counts_up_to(entry.get("step"), _MOST_STEPS) and _counts_up_to(
                entry.get("time"), _LATEST
            ):
                self._add_values(_point(entry, int(entry["step"])))
            return
        fields = entry.get("fields", entry)
        if isinstance(fields, dict):
            kind = str(entry.get("event", entry.get("kind", "")))
            self.events.setdefault(kind, []).append(fields)

    def last_event(self, kind: str) -> dict[str, Any]:
        """Return the fields of the last event of a kind; {} if there is none."""
        return self.events.get(kind, [{}])[-1]

    def series(self, name: str) -> Series:
        """Return the steps at which a metric was logged and its values, by step or else by epoch.

        What is logged at each step is logged once more, as a mean or a last value, at each epoch.
        """
        by_step, by_epoch = (
            [(point.step, point.values[name]) for point in points if name in point.values]
            for points in (self.steps, self.epochs)
        )
        logged = by_step or by_epoch
        steps, values = np.array(logged, dtype=np.float64).reshape(-1, 2).T
        return steps, values

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
        best = self.last_event("training_end").get("best_step")
        if isinstance(best, int):
            return best
        for name, sign in (("val/AP", 1), ("val/loss", -1)):
            steps, values = self.series(name)
            if np.isfinite(values).any():
                return int(steps[np.nanargmax(sign * values)])
        return None

    def _add_values(self, point: Point) -> None:
        names = point.values
        ends_epoch = "train/epoch_loss" in names or any(n.startswith("val/") for n in names)
        points = self.epochs if ends_epoch else self.steps
        place = bisect_left(points, point.step, key=lambda one: one.step)
        if place < len(points) and points[place].step == point.step:
            points[place] = point._replace(values=points[place].values | names)
        else:
            points.insert(place, point)


class GrowingLog:
    """The log of a running training, read on from where the last read ended."""

    def __init__(self, path: Path, samples: Path | None = None) -> None:
        """Args: path: of the log.  samples: of the machine, beside the log by default."""
        self._path, self._samples = path, samples or path.with_name(SAMPLES)
        self.log = TrainingLog()
        self._ends = Counter[Path]()
        """Bytes that were read of each file."""

    def update(self) -> None:
        """Read the whole lines that were added.

        If a file became shorter, both are new ones and are read from their start.

        Raises:
            FileNotFoundError: there is no log.
        """
        files = [self._path, *([self._samples] if self._samples.is_file() else [])]
        if any(file.stat().st_size < self._ends[file] for file in files):
            self.log, self._ends = TrainingLog(), Counter()
        added, *sampled = map(self._added, files)
        for entry in added:
            self.log.add(entry)
        for entry in chain.from_iterable(sampled):
            if isinstance(entry.get("values"), dict) and _counts_up_to(entry.get("time"), _LATEST):
                self.log.samples.append(_point(entry, len(self.log.samples) + 1))

    def _added(self, path: Path) -> list[dict[str, Any]]:
        with open_plain(path) as file:
            file.seek(self._ends[path])
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._ends[path] += len(whole)
        found = []
        for line in whole.decode(errors="replace").splitlines():
            with suppress(ValueError):  # a crash cut it short
                found.append(parse_json(line))
        return [entry for entry in found if isinstance(entry, dict)]


def read_log(path: Path) -> TrainingLog:
    """Read a training's log; DataError if there is none."""
    growing = GrowingLog(path)
    try:
        growing.update()
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro train` first") from None
    return growing.log


def number(value: object) -> float:
    """Return a float; NaN, a gap in a curve, for infinities and what is no number."""
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return result if math.isfinite(result) else math.nan


def _counts_up_to(value: object, most: float) -> bool:
    """Return True for a number from 0 on; what else a line has there is no step and no time."""
    return isinstance(value, int | float) and 0 <= value < most


def _point(entry: dict[str, Any], step: int) -> Point:
    values = {name: number(value) for name, value in entry["values"].items()}
    return Point(step, number(entry.get("time")), values)
