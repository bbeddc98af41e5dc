"""The guard: counts skipped steps, finds loss spikes, and rolls training back to an anchor.

The device has skipped a bad step before the host knows of it. What a step's values lead to is
decided after the next step, wherever a checkpoint made them known earlier, so that a resumed
training decides the same.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median

from runkey.errors import TrainingError
from runkey.files import json_safe, write_json
from runkey.training.build import Tracker, TrainContext
from runkey.training.checkpoint import FolderCheckpoints, find_checkpoints
from runkey.training.state import NORMS_KEPT, LoopState, Rollback, Skip, StepValues
from runkey.training.tensors import all_finite
from runkey.units import counted

logger = logging.getLogger(__name__)

# Loss spikes.

# The standard deviation of a normal distribution, in median absolute deviations.
_DEVIATIONS = 1.4826
# Least spread, as a part of the median: losses that hardly differ say nothing about spikes.
_LEAST_PART = 1e-3


def robust_score(value: float, history: Sequence[float]) -> float:
    """Return how many robust standard deviations a value lies above the median of others.

    The robust z-score of Iglewicz and Hoaglin (1993): neither median nor median absolute deviation
    is moved by a few wild values. All values are finite, and so is the score, unless they are near
    the largest float.
    """
    middle = median(history)
    spread = _DEVIATIONS * median(abs(other - middle) for other in history)
    return (value - middle) / max(spread, _LEAST_PART * abs(middle), math.ulp(1.0))


# Pins: the checkpoint before a bad step is kept, so that `runkey debug-step` can replay the step.

# Pins that are kept; each takes as much space as a checkpoint.
_KEPT = 3

_NAME = re.compile(r"bad-step-(\d{8,})\.ckpt")


def pin_before(folder: Path, step: int) -> Path | None:
    """Hard-link the newest checkpoint from before a step to a name that is not removed.

    Another thread may be removing checkpoints meanwhile. Steps count from 1: the checkpoint is of
    fewer steps than this. Returns None if there is none; raises OSError if links are refused.
    """
    path = folder / f"bad-step-{step:08d}.ckpt"
    for name in find_checkpoints(folder):
        if name.step >= step:
            continue
        with suppress(FileNotFoundError):  # removed meanwhile
            path.unlink(missing_ok=True)
            path.hardlink_to(folder / name.name)
            for old in sorted(find_pins(folder))[:-_KEPT]:
                find_pins(folder)[old].unlink()
            return path
    return None


def find_pins(folder: Path) -> dict[int, Path]:
    """Return the pinned checkpoints by the bad step's number."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match.group(1)): path for match, path in matches if match}


# Reports of bad steps: JSON files in the training's folder.

REPORTS = "bad-step-*.json"
"""Pattern of their names."""


_MOST_IDS_SHOWN = 8


def shown_ids(ids: Sequence[int]) -> str:
    """Format the first image ids, with a mark if there are more."""
    more = ", ..." if len(ids) > _MOST_IDS_SHOWN else ""
    return ", ".join(map(str, ids[:_MOST_IDS_SHOWN])) + more


# Spikes that follow one another sooner than this many steps are logged as one.
_QUIET_STEPS = 50


class Guard:
    """Counts what the device skipped, finds spikes, and decides on rollbacks."""

    def __init__(
        self,
        context: TrainContext,
        state: LoopState,
        tracker: Tracker,
        checkpoints: FolderCheckpoints | None,
    ) -> None:
        self._context, self._loop, self._state = context, state, state.guard
        self._tracker, self._checkpoints = tracker, checkpoints
        self._limits = context.settings.guard
        self._folder = checkpoints.path if checkpoints else None

    def note(self, step: StepValues) -> None:
        """Take note of a step's values, in the order of the steps, each once."""
        state = self._state
        loss, norm = step.values["train/loss"], step.values["train/grad_norm"]
        state.norms = [*state.norms, norm][-NORMS_KEPT:]
        if step.values["skipped"]:
            self._note_skip(step)
        else:
            self._loop.skipped_in_a_row = 0
        if math.isfinite(loss):
            self._note_loss(step.step, loss, step.image_ids)

    @property
    def has_just_rolled_back(self) -> bool:
        """Whether training was rolled back at this boundary of a step."""
        rollbacks = self._state.rollbacks
        return bool(rollbacks) and rollbacks[-1].at == self._loop.step

    def act(self) -> None:
        """Roll training back, after a step, if the steps before it call for that.

        Raises TrainingError if there is no anchor, or there have been too many rollbacks.
        """
        limits, last = self._limits, self._loop.step - 1
        recent = self._recent(last)
        if len(recent) >= limits.max_skips:
            self._roll_back(
                f"loss or gradients were not finite in {len(recent)} of the last "
                f"{counted(min(limits.window_steps, last), 'step')}"
            )
        # Weights that are not finite make every later step a skipped one: waiting is useless.
        # Looked at after a skipped step only: this waits for the device.
        elif self._loop.skipped_in_a_row and not all_finite(
            self._context.step.model.state_dict().values()
        ):
            self._roll_back("weights are not finite")

    def act_before_evaluation(self) -> None:
        """Roll training back, as `act` does, if what is to be evaluated now is not finite."""
        if not all_finite(self._context.evaluated_module.state_dict().values()):
            self._roll_back("weights are not finite")

    def wants_anchor(self) -> bool:
        """Return True if these weights, if finite, are worth a rollback to them."""
        is_calm = 2 * len(self._recent(self._loop.step - 1)) < self._limits.max_skips
        on_grid = self._loop.step % self._limits.anchor_steps == 0
        return on_grid and is_calm and not self._loop.skipped_in_a_row

    def _note_skip(self, step: StepValues) -> None:
        loop, state = self._loop, self._state
        loop.skipped_steps += 1
        loop.skipped_in_a_row += 1
        values = {name: value for name, value in step.values.items() if name != "skipped"}
        by_scaler = math.isfinite(values["train/loss"]) and values.get("train/loss_scale", 0) > 1
        lr = step.rates["train/lr"]
        skip = Skip(step.step, list(step.image_ids), lr, values, list(step.faults))
        self._tracker.event("skipped_step", **json_safe(asdict(skip)), counts=not by_scaler)
        if by_scaler:
            state.scaler_skips += 1
            return
        if not self._recent(step.step):
            self._report_first(skip)
        state.skips = [*state.skips, skip][-self._limits.max_skips :]

    def _report_first(self, skip: Skip) -> None:
        """Log what happened, and pin the checkpoint before it."""
        pinned = None
        if self._folder is not None:
            try:
                pinned = pin_before(self._folder, skip.step)
            except OSError as error:
                logger.info(
                    f"{self._folder}: no checkpoint is kept for debug-step: {error.strerror}"
                )
        found = f" ({'; '.join(skip.faults)})" if skip.faults else ""
        look = f"; `runkey debug-step --step {skip.step}` finds the cause" if pinned else ""
        logger.info(
            f"step {skip.step} (lr {skip.lr:.3g}, images {shown_ids(skip.image_ids)}) is "
            f"skipped: loss or gradients are not finite{found}{look}"
        )

    def _note_loss(self, step: int, loss: float, image_ids: tuple[int, ...]) -> None:
        state, limits = self._state, self._limits
        full = len(state.losses) == limits.spike_history
        score = robust_score(loss, state.losses) if full else 0.0
        state.losses = [*state.losses, loss][-limits.spike_history :]
        if not limits.spike_score or score < limits.spike_score:
            return
        state.spikes += 1
        self._tracker.event(
            "loss_spike", step=step, loss=loss, score=score, image_ids=list(image_ids)
        )
        if state.last_spike is None or step - state.last_spike > _QUIET_STEPS:
            logger.info(
                f"step {step} (images {shown_ids(image_ids)}): the loss spikes to {loss:.4g}, "
                f"{score:.0f} robust deviations above the median of {limits.spike_history}"
            )
        state.last_spike = step

    def _recent(self, last_step: int) -> list[Skip]:
        """The skips that count among the steps up to one."""
        before = last_step - self._limits.window_steps
        return [skip for skip in self._state.skips if before < skip.step <= last_step]

    def _roll_back(self, reason: str) -> None:
        """Restore the newest anchor; the step counter goes on, so other images come next."""
        loop, state = self._loop, self._state
        done = len(state.rollbacks)
        anchor = None
        if done < self._limits.max_rollbacks:
            anchor = self._checkpoints.load_anchor(loop.step) if self._checkpoints else None
            anchor = self._context.world.broadcast(anchor)
        if anchor is None:
            self._give_up(reason)
            return
        outcome = f"rolled back to the weights of step {anchor.step}, continuing with new images"
        self._write_report(reason, outcome)
        self._context.restore(anchor.parts)
        state.rollbacks.append(Rollback(loop.step, anchor.step, reason))
        state.skips, loop.skipped_in_a_row = [], 0
        self._tracker.event("rollback", step=loop.step, to=anchor.step, reason=reason)
        logger.info(
            f"after step {loop.step}: {reason}; {outcome} "
            f"({done + 1} of at most {counted(self._limits.max_rollbacks, 'time')})"
        )

    def _give_up(self, reason: str) -> None:
        loop, done, skips = self._loop, len(self._state.rollbacks), self._state.skips
        why = (
            f"already rolled back {counted(done, 'time')}"
            if done
            else "there is no anchor to roll back to"
        )
        report = self._write_report(reason, f"stopped: {why}")
        self._tracker.event("gave_up", step=loop.step, reason=reason, rollbacks=done)
        last = skips[-1] if skips else None
        at = f" (lr {last.lr:.3g}, images {shown_ids(last.image_ids)})" if last else ""
        first = skips[0].step if skips else loop.step
        look = f"; see {report}, and `runkey debug-step --step {first}`" if report else ""
        raise TrainingError(
            f"step {last.step if last else loop.step}{at}: {reason}; {why}{look}; a lower lr or "
            "training.precision: off may help"
        )

    def _write_report(self, reason: str, outcome: str) -> str:
        """Write the report; return its path, empty if it could not be written."""
        if self._folder is None:
            return ""
        guard, step = self._state, self._loop.step
        report = {
            "step": guard.skips[0].step if guard.skips else step,
            "steps_done": step,
            "reason": reason,
            "outcome": outcome,
            "skips": [asdict(skip) for skip in guard.skips],
            "rollbacks": [asdict(rollback) for rollback in guard.rollbacks],
            "scaler_skips": guard.scaler_skips,
            "latest_grad_norms": guard.norms,
            "latest_losses": guard.losses,
            "loss_spikes": guard.spikes,
        }
        path = self._folder / f"bad-step-{report['step']}.json"
        try:
            write_json(path, json_safe(report))
        except OSError as error:
            logger.info(f"{self._folder}: the report is not written: {error.strerror}")
            return ""
        return str(path)
