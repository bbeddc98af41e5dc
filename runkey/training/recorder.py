"""The numbers of a running epoch on their way to the tracker, the bar and the epoch's line."""

from __future__ import annotations

from torch import Tensor

from runkey.training.guard.guard import Guard
from runkey.training.meters import LateReader, Pace, Reading
from runkey.training.progress import Display, bar_text
from runkey.training.setup import Setup
from runkey.training.state import LoopState
from runkey.training.step import StepResult


class EpochRecorder:
    """Takes each step's result, and hands its values on one step later."""

    def __init__(self, setup: Setup, state: LoopState, display: Display, guard: Guard) -> None:
        """Start an epoch, or go on in the middle of one, as the state says."""
        self._running = running = state.running
        self.pace = Pace.after(running.images, running.wait_seconds, running.seconds)
        """Of the whole epoch."""
        self.recent = Pace()
        """Since the last logged step."""
        self._setup, self._state, self._display, self._guard = setup, state, display, guard
        self._reader = LateReader()

    def record(self, result: StepResult, factor: float) -> None:
        """Queue the values of the step that `state.step` now counts."""
        for pace in (self.pace, self.recent):
            pace.images += len(result.image_ids)
        lr = self._setup.params.lr * factor
        reading = Reading(self._state.step, result.image_ids, lr, {}, result.faults)
        self._take(self._reader.push(reading, _scalars(result)))

    def settle(self) -> None:
        """Wait for the last step, so that the state holds all numbers up to it."""
        self._take(self._reader.flush())
        running, pace = self._running, self.pace
        running.images, running.wait_seconds = pace.images, pace.wait_seconds
        running.seconds = pace.seconds

    def finish(self) -> dict[str, float]:
        """Wait for the last step; the epoch's values by metric name.

        Losses are means under `train/epoch_loss` and so on, so that they lie on one axis with the
        evaluation's; gradient norms are means, the rate is the last.
        """
        self.settle()
        running = self._running
        values = {
            name.replace("/loss", "/epoch_loss"): value
            for name, value in running.means.means().items()
        }
        values |= _pace_values(self.pace)
        return values if running.lr is None else values | {"train/lr": running.lr}

    def _take(self, reading: Reading | None) -> None:
        """Judge, log and show a step whose values have arrived on the host."""
        if reading is None:
            return
        self._guard.note(reading)
        values = {name: value for name, value in reading.values.items() if name != "skipped"}
        self._running.means.add(values)
        self._running.lr = reading.lr
        if reading.step > 1 and reading.step % self._setup.params.runtime.log_every:
            return
        values |= _pace_values(self.recent)
        values["train/lr"] = reading.lr
        values["train/epoch"] = reading.step / self._setup.loader.steps_per_epoch
        self.recent.restart()
        self._setup.tracker.log(values, reading.step)
        text = bar_text(values, self._setup.seconds_left(self._state.step, self._state.seconds))
        self._display.update(self._state.step, self._state.epoch + 1, text)


def _scalars(result: StepResult) -> dict[str, Tensor]:
    """A step's scalars by metric name, and whether it was skipped."""
    values = {f"train/{name}": value for name, value in result.losses.items()}
    values |= {
        "train/grad_norm": result.clipped.before,
        "train/grad_norm_clipped": result.clipped.after,
        "skipped": result.skipped,
    }
    if result.clipped.threshold is not None:
        values["train/clip_threshold"] = result.clipped.threshold
    if result.scale is not None:
        values["train/loss_scale"] = result.scale
    return values


def _pace_values(pace: Pace) -> dict[str, float]:
    return {
        "train/images_per_second": pace.images_per_second,
        "train/data_wait_share": pace.data_wait_share,
    }
