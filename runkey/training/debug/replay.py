"""From a training's folder to the state right before one of its steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.data.batch import Window
from runkey.errors import TrainingError
from runkey.training.checkpoint.file import DamagedError, read_facts, read_file
from runkey.training.checkpoint.names import find_saved
from runkey.training.guard.pins import find_pins
from runkey.training.guard.report import REPORTS
from runkey.training.loop import take_step
from runkey.training.setup import Setup
from runkey.training.split import cut
from runkey.training.state import LoopState

LOG = "train.jsonl"
"""In a training's folder: the log that it writes as it goes."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a replay begins."""

    path: Path | None
    """The checkpoint; None: the start of training."""
    step: int
    """Steps done there."""
    fingerprint: Mapping[str, Any]
    """What trained: micro-batch, world size, device, precision."""


def find_start(folder: Path, step: int) -> Start:
    """The nearest checkpoint in a folder from before a step (from 1).

    Raises:
        TrainingError: there is none that can be read, nor does the folder hold another one that
            says how the run was trained.
    """
    paths = [folder / saved.name for saved in find_saved(folder)]
    starts = [start for path in [*paths, *find_pins(folder).values()] if (start := _read(path))]
    before = [start for start in starts if start.step < step]
    if before:
        return max(before, key=lambda start: start.step)
    if not starts:
        raise TrainingError(
            f"{folder}: holds no checkpoint; train with `dvc repro`, or name a bundle "
            "(bad-step-*.pt)"
        )
    # Fewer steps than to the first checkpoint: from the beginning, in the same way.
    return Start(None, 0, starts[0].fingerprint)


def _read(path: Path) -> Start | None:
    try:
        facts = read_facts(path)
        return Start(path, int(facts["step"]), facts["fingerprint"])
    except (DamagedError, KeyError):
        return None


def bad_steps(folder: Path) -> list[int]:
    """The steps that a training reported or kept a checkpoint for, rising."""
    reports = (path.stem.removeprefix("bad-step-") for path in folder.glob(REPORTS))
    return sorted({int(text) for text in reports if text.isdigit()} | find_pins(folder).keys())


def replay(setup: Setup, start: Start, step: int, folder: Path) -> Window:
    """Bring model, optimizer and so on to where they were before a step; that step's window.

    Args:
        setup: of the same run, freshly built.
        start: where to begin.
        step: from 1.
        folder: the training's, for its log.

    Raises:
        TrainingError: training has no such step, or a file is damaged.
    """
    total = setup.schedule.total_steps
    if not start.step < step <= total:
        raise TrainingError(f"--step {step}: training has the steps 1 to {total}")
    state = LoopState() if start.path is None else _restore(setup, start.path)
    log = folder / LOG
    evaluations = _logged_evaluations(log, setup.watched) if log.is_file() else []
    setup.machinery.model.train()
    while True:
        per_epoch = setup.loader.steps_per_epoch
        state.epoch = state.step // per_epoch
        watched = [value for at, value in evaluations if at <= state.epoch * per_epoch]
        for window in setup.loader.epoch(state.epoch, state.step - state.epoch * per_epoch):
            if state.step == step - 1:
                return cut(window, state.limit)  # as it was computed
            take_step(setup, state, window, watched)


def _restore(setup: Setup, path: Path) -> LoopState:
    try:
        _, tensors, _ = read_file(path)
    except DamagedError as error:
        raise TrainingError(f"{path}: {error}") from error
    for name, part in setup.parts.items():
        part.load_state_dict(tensors["parts"][name])
    return LoopState.from_plain(tensors["state"], {})


def logged_losses(log: Path, step: int) -> dict[str, float]:
    """The losses of a step as the training had them; empty if it logged none of that step."""
    for entry in _entries(log):
        fields = entry.get("fields", {}) if entry.get("event") == "skipped_step" else entry
        values = fields.get("values", {})
        if fields.get("step") == step and "train/loss" in values:
            losses = {n.removeprefix("train/"): v for n, v in values.items() if "/loss" in n}
            losses.pop("loss_scale", None)
            return {name: float(value) for name, value in losses.items()}
    return {}


def _logged_evaluations(log: Path, metric: str) -> list[tuple[int, float]]:
    """Step and value of a metric at each evaluation: what plateau goes by."""
    return [
        (int(entry["step"]), float(entry["values"][metric]))
        for entry in _entries(log)
        if metric in entry.get("values", {})
    ]


def _entries(log: Path) -> Iterator[dict[str, Any]]:
    """A log's lines, without one that was cut short when the training was killed."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry
