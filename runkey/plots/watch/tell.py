"""What a growing log says, as lines: one or two for each epoch, the hints, the end."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runkey.plots.hints import Hint, all_hints, told_hints
from runkey.plots.log import TrainingLog
from runkey.plots.samples import read_samples
from runkey.progress import WIDTH
from runkey.training.progress import epoch_line


class Teller:
    """Tells what was added to a log since it was asked last."""

    def __init__(self, params: Mapping[str, Any], samples: Path) -> None:
        """Nothing has been told.

        Args:
            params: of the training, see `find_hints`.
            samples: of the machine; need not be there.
        """
        self._params, self._samples = params, samples
        self._epochs = 0
        self._hints: set[str] = set()
        self._started = self._ended = False

    def new_lines(self, log: TrainingLog) -> list[str]:
        """Lines about what is new, at most 100 columns wide."""
        lines: list[str] = []
        start = log.events.get("training_start")
        if start and not self._started:
            self._started = True
            lines.append(f"training on {start.get('device')}, {total_steps(log):,} steps")
        # A training that goes on after an interruption takes steps back.
        self._epochs = min(self._epochs, len(log.epochs))
        if self._epochs < len(log.epochs):
            for number in range(self._epochs, len(log.epochs)):
                lines += _epoch(log, number).split("\n")
            self._epochs = len(log.epochs)
            lines += self._new(all_hints(log, self._params, read_samples(self._samples)))
        lines += self._new(told_hints(log))  # of an epoch that was read a moment before them
        if (end := ended(log)) and not self._ended:
            self._ended = True
            lines += textwrap.wrap(end, WIDTH)
        return lines

    def _new(self, hints: Iterable[Hint]) -> list[str]:
        lines = []
        for hint in hints:
            if hint.kind not in self._hints:
                self._hints.add(hint.kind)
                lines += hint.lines
        return lines


def ended(log: TrainingLog) -> str:
    """How the training ended; empty while it goes on."""
    end = log.events.get("training_end")
    if not end:
        return ""
    return f"{end.get('reason')}; kept the weights of epoch {end.get('best_epoch')}"


def total_steps(log: TrainingLog) -> int:
    """Optimizer steps of the whole training; 0 if the log does not say."""
    return int(log.events.get("training_start", {}).get("total_steps", 0))


def last_step(log: TrainingLog) -> int:
    """The newest step that was logged; 0 before the first."""
    return max((points[-1].step for points in (log.steps, log.epochs) if points), default=0)


def seconds_left(log: TrainingLog, now: float) -> float:
    """Time that the steps to come take if they are like those of the last two epochs.

    Args:
        log: of the training.
        now: seconds since 1970.

    Returns:
        NaN if there is nothing to go by.
    """
    since = log.steps[-1].step - 2 * (log.steps_per_epoch or 0) if log.steps else 0
    recent = [point for point in log.steps if point.step >= since]
    if len(recent) < 2 or not total_steps(log):
        return math.nan
    pace = (recent[-1].seconds - recent[0].seconds) / (recent[-1].step - recent[0].step)
    left = (total_steps(log) - recent[-1].step) * pace - (now - recent[-1].seconds)
    return max(0.0, left)


def _epoch(log: TrainingLog, number: int) -> str:
    """The lines of an epoch, as the training itself prints them."""
    point = log.epochs[number]
    per_epoch = log.steps_per_epoch or point.step
    epochs = round(max(total_steps(log), last_step(log)) / per_epoch)
    seen = TrainingLog(log.steps, log.epochs[: number + 1])
    left = seconds_left(
        TrainingLog([p for p in log.steps if p.step <= point.step], [], log.events), point.seconds
    )
    finite = {name: value for name, value in point.values.items() if math.isfinite(value)}
    return epoch_line(
        round(point.step / per_epoch),
        epochs,
        finite,
        0.0 if math.isnan(left) else left,
        watched="val/AP",
        is_best="val/AP" in finite and seen.best_step() == point.step,
    )
