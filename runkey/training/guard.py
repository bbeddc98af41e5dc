"""Watches a training's numbers, one step late, and takes it back where they stay wrong.

The device has skipped a bad step before anyone knows of it; here it is counted.  What a step's
values lead to is done after the step behind it, wherever a checkpoint made them known earlier, so
that an interrupted training does the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from runkey.data.dataset import GlobalBatch
from runkey.errors import TrainingError
from runkey.training.build import Setup, announce
from runkey.training.checkpoint.file import Content, find_saved
from runkey.training.distributed import LostRankError, SharedError
from runkey.training.metrics import Reading
from runkey.training.split import is_out_of_memory
from runkey.training.state import NORMS_KEPT, GuardState, LoopState, Rollback, Skip
from runkey.training.step import image_ids_of

# Whether a loss is far above the ones before it.


# The standard deviation of a normal distribution, in median absolute deviations.
_DEVIATIONS = 1.4826
# Losses that hardly differ are no measure of what is far: a thousandth of their median is not.
_LEAST_PART = 1e-3


def robust_score(value: float, history: Sequence[float]) -> float:
    """How many robust standard deviations a value lies above the median of others.

    The robust z-score of Iglewicz and Hoaglin (1993): neither median nor median absolute deviation
    is moved by a few wild values.

    Args:
        value: finite.
        history: finite values, at least one.

    Returns:
        Negative below the median; always finite, unless value and history are near the largest
        float.
    """
    middle = median(history)
    spread = _DEVIATIONS * median(abs(other - middle) for other in history)
    return (value - middle) / max(spread, _LEAST_PART * abs(middle), math.ulp(1.0))


# The checkpoint before a bad step is kept, so that the step can be looked at later.


# Each holds as much as a checkpoint.
_KEPT = 3

_NAME = re.compile(r"bad-step-(\d{8,})\.ckpt")


def pin_before(folder: Path, step: int) -> Path | None:
    """Give the newest checkpoint from before a step a second name, under which it stays.

    Args:
        folder: of the training; another thread may be removing checkpoints.
        step: the bad one's number, from 1: a checkpoint of fewer steps than this.

    Returns:
        The new name; None if there is no such checkpoint.

    Raises:
        OSError: the file system has no hard links, or refuses.
    """
    path = folder / f"bad-step-{step:08d}.ckpt"
    for saved in find_saved(folder):
        if saved.step >= step:
            continue
        with suppress(FileNotFoundError):  # removed meanwhile
            path.unlink(missing_ok=True)
            path.hardlink_to(folder / saved.name)
            for old in sorted(find_pins(folder))[:-_KEPT]:
                find_pins(folder)[old].unlink()
            return path
    return None


def find_pins(folder: Path) -> dict[int, Path]:
    """The checkpoints that were kept, by the bad step's number."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match.group(1)): path for match, path in matches if match}


# The report of steps that went wrong: a JSON file in the training's folder.


REPORTS = "bad-step-*.json"
"""Pattern of their names."""


def report_name(step: int) -> str:
    """Name of the file about a step and what followed."""
    return f"bad-step-{step}.json"


def make_report(guard: GuardState, *, step: int, reason: str, outcome: str) -> dict[str, Any]:
    """All that is known, as JSON takes it: numbers that are not finite are text (`nan`, `inf`).

    Args:
        guard: at least one of its steps was skipped, or weights are not finite.
        step: steps done.
        reason: what is wrong.
        outcome: what was done about it.
    """
    report = {
        "step": first_bad_step(guard, step),
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
    plain: dict[str, Any] = json_safe(report)
    return plain


def first_bad_step(guard: GuardState, step: int) -> int:
    """The step to look at: the first of those that count."""
    return guard.skips[0].step if guard.skips else step


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Write it; an older report of the same step is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / report_name(report["step"])
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def json_safe(value: Any) -> Any:
    """The same, with floats that JSON has no form for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


# Failures inside a step, told with the step, its images and the way out.


_MOST_IDS_SHOWN = 8


@contextmanager
def explained(step: int, window: GlobalBatch, lr: float) -> Iterator[None]:
    """Turn what can go wrong in a step into one line that a user can act on.

    Args:
        step: its number, from 1.
        window: its images.
        lr: its rate.

    Raises:
        StoppedError: memory ran out with one image, or a rank has ended.
        TrainingError: memory ran out, an operation has no deterministic form, or the criterion
            found something that is not finite.
    """
    try:
        yield
    except LostRankError:
        raise
    except SharedError as error:
        raise SharedError(f"step {step} (lr {lr:.3g}), {error}") from error
    except TrainingError as error:
        raise type(error)(
            f"step {step} (lr {lr:.3g}, images {shown_ids(image_ids_of(window))}): {error}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"step {step}: memory ran out outside of the forward and backward passes, where"
                " smaller batches do not help; it needs a device with more memory"
            ) from None
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not")[0]
        raise TrainingError(
            f"step {step}: {operation} has no deterministic form on this device; "
            "set training.deterministic: false"
        ) from error


def shown_ids(ids: tuple[int, ...]) -> str:
    """The first image ids, with a mark if there are more."""
    more = ", ..." if len(ids) > _MOST_IDS_SHOWN else ""
    return ", ".join(map(str, ids[:_MOST_IDS_SHOWN])) + more


# From a running training to a checkpoint's content, and back.


def take_content(setup: Setup, state: LoopState) -> Content:
    """What has to be saved at this boundary of a step; tensors are not copied."""
    return Content(
        step=state.step,
        state=state.as_plain(),
        parts={name: part.state_dict() for name, part in setup.parts.items()},
        position=setup.tracker.position(),
        best_weights=state.best_weights,
    )


def put_back(setup: Setup, content: Content) -> None:
    """Give model, average, optimizer and so on the content's tensors."""
    for name, part in setup.parts.items():
        part.load_state_dict(content.parts[name])


def begin(setup: Setup) -> LoopState:
    """The state that training starts from: of the newest checkpoint, else a new one."""
    content = setup.checkpoints.load() if setup.checkpoints else None
    choices = announce(setup)
    if content is None:
        setup.tracker.resume(None)
        setup.tracker.event("training_start", **choices)
        return LoopState()
    put_back(setup, content)
    setup.tracker.resume(content.position)
    exactly = f", not bit for bit: {content.changes}" if content.changes else ""
    setup.say(f"going on after step {content.step} of {setup.schedule.total_steps}{exactly}")
    setup.tracker.event("resumed", step=content.step, changes=content.changes)
    return LoopState.from_plain(content.state, content.best_weights)


# Spikes that follow one another sooner than this many steps are told as one.
_QUIET_STEPS = 50


class Guard:
    """Counts what the device skipped, finds spikes, and decides."""

    def __init__(self, setup: Setup, state: LoopState) -> None:
        """Go on with what `state.guard` remembers."""
        self._setup, self._loop, self._state = setup, state, state.guard
        self._section = setup.params.training.guard
        self._folder = setup.checkpoints.path if setup.checkpoints else None

    def note(self, reading: Reading) -> None:
        """Take a step's values, in the order of the steps, each once."""
        state = self._state
        loss, norm = reading.values["train/loss"], reading.values["train/grad_norm"]
        state.norms = [*state.norms, norm][-NORMS_KEPT:]
        if reading.values["skipped"]:
            self._note_skip(reading)
        else:
            self._loop.skipped_in_a_row = 0
        if math.isfinite(loss):
            self._note_loss(reading.step, loss, reading.image_ids)

    @property
    def has_just_gone_back(self) -> bool:
        """Whether training was taken back at this boundary of a step."""
        rollbacks = self._state.rollbacks
        return bool(rollbacks) and rollbacks[-1].at == self._loop.step

    def act(self) -> None:
        """After a step: take training back if the steps before it call for that.

        Raises:
            TrainingError: it cannot be taken back, or has been too often.
        """
        reason = self._too_many() or self._broken_weights()
        if reason:
            self._go_back(reason)

    def act_before_evaluation(self) -> None:
        """At an epoch's end: the same if what is to be evaluated is not finite.

        Raises:
            TrainingError: see `act`.
        """
        if not all_finite(self._setup.evaluated_module.state_dict().values()):
            self._go_back("weights are not finite")

    def wants_anchor(self) -> bool:
        """Whether these weights, if finite, are worth going back to."""
        is_calm = 2 * len(self._recent(self._loop.step - 1)) < self._section.max_skips
        on_grid = self._loop.step % self._section.anchor_steps == 0
        return on_grid and is_calm and not self._loop.skipped_in_a_row

    def _note_skip(self, reading: Reading) -> None:
        loop, state = self._loop, self._state
        loop.skipped_steps += 1
        loop.skipped_in_a_row += 1
        values = {name: value for name, value in reading.values.items() if name != "skipped"}
        by_scaler = math.isfinite(values["train/loss"]) and values.get("train/loss_scale", 0) > 1
        skip = Skip(reading.step, list(reading.image_ids), reading.lr, values, list(reading.faults))
        self._setup.tracker.event("skipped_step", **json_safe(asdict(skip)), counts=not by_scaler)
        if by_scaler:
            state.scaler_skips += 1
            return
        if not self._recent(reading.step):
            self._tell_first(skip)
        state.skips = [*state.skips, skip][-self._section.max_skips :]

    def _tell_first(self, skip: Skip) -> None:
        """Say what happened, and keep the checkpoint before it."""
        setup = self._setup
        kept = None
        if self._folder is not None:
            try:
                kept = pin_before(self._folder, skip.step)
            except OSError as error:
                setup.say(f"{self._folder}: no checkpoint is kept for debug-step: {error.strerror}")
        found = f" ({'; '.join(skip.faults)})" if skip.faults else ""
        look = f"; `runkey debug-step --step {skip.step}` finds the cause" if kept else ""
        setup.say(
            f"step {skip.step} (lr {skip.lr:.3g}, images {shown_ids(tuple(skip.image_ids))}) is "
            f"skipped: loss or gradients are not finite{found}{look}"
        )

    def _note_loss(self, step: int, loss: float, image_ids: tuple[int, ...]) -> None:
        state, section = self._state, self._section
        full = len(state.losses) == section.spike_history
        score = robust_score(loss, state.losses) if full else 0.0
        state.losses = [*state.losses, loss][-section.spike_history :]
        if not section.spike_score or score < section.spike_score:
            return
        state.spikes += 1
        self._setup.tracker.event(
            "loss_spike", step=step, loss=loss, score=score, image_ids=list(image_ids)
        )
        if state.last_spike is None or step - state.last_spike > _QUIET_STEPS:
            self._setup.say(
                f"step {step} (images {shown_ids(image_ids)}): the loss spikes to {loss:.4g}, "
                f"{score:.0f} robust deviations above the median of {section.spike_history}"
            )
        state.last_spike = step

    def _recent(self, last_step: int) -> list[Skip]:
        """The skips that count among the steps up to one."""
        before = last_step - self._section.window_steps
        return [skip for skip in self._state.skips if before < skip.step <= last_step]

    def _too_many(self) -> str:
        section, last = self._section, self._loop.step - 1
        recent = self._recent(last)
        if len(recent) < section.max_skips:
            return ""
        return (
            f"loss or gradients were not finite in {len(recent)} of the last "
            f"{min(section.window_steps, last)} steps"
        )

    def _broken_weights(self) -> str:
        """Weights that are not finite make every step a skipped one; no use to wait for more."""
        # Looked at after a skipped step only: this waits for the device.
        if not self._loop.skipped_in_a_row:
            return ""
        weights = self._setup.machinery.model.state_dict().values()
        return "" if all_finite(weights) else "weights are not finite"

    def _go_back(self, reason: str) -> None:
        """Restore the newest anchor; the step counter goes on, so other images come next."""
        setup, loop, state = self._setup, self._loop, self._state
        done = len(state.rollbacks)
        anchor = None
        if setup.checkpoints and done < self._section.max_rollbacks:
            anchor = setup.checkpoints.load_anchor(loop.step)
        if anchor is None:
            self._stop(reason)
            return
        outcome = f"back to the weights of step {anchor.step}, on with the images that come next"
        self._keep_report(reason, outcome)
        put_back(setup, anchor)
        state.rollbacks.append(Rollback(loop.step, anchor.step, reason))
        state.skips, loop.skipped_in_a_row = [], 0
        setup.tracker.event("rollback", step=loop.step, to=anchor.step, reason=reason)
        setup.say(
            f"after step {loop.step}: {reason}; {outcome} "
            f"({done + 1} of at most {self._section.max_rollbacks} times)"
        )

    def _stop(self, reason: str) -> None:
        """Give up, with a report."""
        setup, loop, done = self._setup, self._loop, len(self._state.rollbacks)
        why = f"gone back {done} times already" if done else "there is no anchor to go back to"
        report = self._keep_report(reason, f"stopped: {why}")
        setup.tracker.event("gave_up", step=loop.step, reason=reason, rollbacks=done)
        skips = self._state.skips
        last = skips[-1] if skips else None
        at = f" (lr {last.lr:.3g}, images {shown_ids(tuple(last.image_ids))})" if last else ""
        first = first_bad_step(self._state, loop.step)
        look = f"; see {report}, and `runkey debug-step --step {first}`" if report else ""
        raise TrainingError(
            f"step {last.step if last else loop.step}{at}: {reason}; {why}{look}; a lower lr or "
            "training.precision: off may help"
        )

    def _keep_report(self, reason: str, outcome: str) -> str:
        """Write the report; where it is, empty if it is nowhere."""
        if self._folder is None:
            return ""
        report = make_report(self._state, step=self._loop.step, reason=reason, outcome=outcome)
        try:
            return str(write_report(self._folder, report))
        except OSError as error:
            self._setup.say(f"{self._folder}: the report is not written: {error.strerror}")
            return ""


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no floating tensor holds NaN or infinity; waits for the device."""
    floating = [t for t in tensors if t.is_floating_point() and t.numel()]
    # The largest absolute value cannot overflow, as a sum of squares can.
    largest = torch.stack([n.float() for n in torch._foreach_norm(floating, float("inf"))])
    return bool(largest.isfinite().all())
