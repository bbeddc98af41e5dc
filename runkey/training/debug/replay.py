"""Replay a step of a run: from a checkpoint in the training's folder, or from a bundle.

A bundle (`bad-step-STEP.pt`) holds one step in a small file, which replays where there is neither
data set nor checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runkey import paths
from runkey.data.dataset import Batch, GlobalBatch
from runkey.data.index import read_classes
from runkey.data.normalise import normalise
from runkey.errors import TrainingError
from runkey.params import Params, parse_params
from runkey.training.build import (
    Replacements,
    TrainContext,
    TrainData,
    build_loader,
    build_training,
)
from runkey.training.checkpoint.file import DamagedError, find_checkpoints, read_facts, read_file
from runkey.training.checkpoint.folder import differences
from runkey.training.debug.probe import DebugFinding, Probe, bad_rows, summaries, summarise
from runkey.training.device import choose_device, seed_step
from runkey.training.guard import REPORTS, find_pins
from runkey.training.loop import take_step
from runkey.training.state import LoopState
from runkey.training.step import TrainStep, accumulate_gradients, split_batches
from runkey.training.tensors import all_finite, host_weights

logger = logging.getLogger(__name__)

# One step under the probe: the first place that is not finite.

# True boxes are fractions of an image; one that reaches this far is none.
_FAR = 2.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of a replayed step."""

    finding: DebugFinding
    losses: dict[str, float]
    """`loss` and `loss_<part>` of the global batch, to be compared with the log."""


class _WatchedCriterion:
    """A criterion that shows its losses to a probe."""

    def __init__(self, criterion: Any, probe: Probe) -> None:
        self._criterion, self._probe = criterion, probe
        self.normaliser = criterion.normaliser

    def __call__(self, outputs: Any, targets: Any, normaliser: Any) -> Any:
        losses = self._criterion(outputs, targets, normaliser)
        named = {**losses.parts, "total": losses.total.detach()}
        bad = [name for name, value in named.items() if not value.isfinite()]
        inputs = summaries({"output": outputs, "targets": targets})
        if bad and all(summary.is_finite for summary in inputs.values()):
            names = ", ".join(name for name in bad if name != "total" or len(bad) == 1)
            tensors = inputs | summaries(named)
            number, ids = self._probe.micro_batch, self._probe.image_ids
            self._probe.found(DebugFinding("loss", names, "criterion", number, ids, tensors))
        return losses


def diagnose(
    parts: TrainStep, batch: GlobalBatch, *, seed: int, step: int, rank: int = 0
) -> Diagnosis:
    """Run a step's forward and backward passes; weights and moments are not changed.

    Args:
        parts: in the state before the step, its model in training mode.
        batch: the step's images.
        seed: of the run.
        step: steps done before this one.
        rank: of the process whose step it is.
    """
    broken = _before(parts.model, batch, parts.channels_last)
    probe = Probe(parts.model, batch)
    criterion: Any = _WatchedCriterion(parts.criterion, probe)
    watched = dataclasses.replace(parts, criterion=criterion)
    parts.gradients.clear()
    with probe.watching():
        losses = accumulate_gradients(watched, batch, reseed=partial(seed_step, seed, step, rank))
    parts.statistics.restore(losses.statistics, torch.ones((), device=parts.device))
    parts.gradients.clear()
    finding = broken or probe.finding or DebugFinding("nowhere")
    return Diagnosis(finding, {name: float(value) for name, value in losses.values.items()})


def _before(model: nn.Module, batch: GlobalBatch, channels_last: bool) -> DebugFinding | None:
    """What is wrong before the step computes anything."""
    for name, tensor in model.state_dict().items():
        if not all_finite([tensor]):
            return DebugFinding("weights", name, tensors={name: summarise(tensor)})
    for number, micro_batch in enumerate(batch, start=1):
        images, _ = normalise(micro_batch, channels_last=channels_last)
        bad = bad_rows(images, micro_batch.image_ids)
        if bad:
            return DebugFinding("image", "", "", number, bad, summaries({"images": images}))
        bad = _with_bad_boxes(micro_batch)
        if bad:
            boxes = {"boxes_cxcywh": micro_batch.boxes_cxcywh}
            return DebugFinding("targets", "", "", number, bad, summaries(boxes))
    return None


def _with_bad_boxes(batch: Batch) -> tuple[int, ...]:
    """Ids of the images with a true box that is not finite or far outside."""
    good = (batch.boxes_cxcywh.isfinite() & (batch.boxes_cxcywh.abs() <= _FAR)).all(1).tolist()
    spans = pairwise(accumulate(batch.counts, initial=0))
    return tuple(
        image_id
        for image_id, (start, end) in zip(batch.image_ids, spans, strict=True)
        if not all(good[start:end])
    )


# Bundles.

_FORMAT = "runkey bad step 1"


@dataclass(frozen=True)
class Bundle:
    """Everything that a step's forward and backward passes depend on."""

    key: str
    """Of the run."""
    step: int
    """Steps done before it."""
    rank: int
    params: dict[str, Any]
    """Of the run, whole, as plain values."""
    num_classes: int
    model: dict[str, Tensor]
    """State dict before the step, on the host."""
    scaler: dict[str, Any]
    """State of fp16's loss scaler; empty without one."""
    batch: GlobalBatch
    device: str
    """cpu or cuda: where the run was trained."""
    torch_version: str

    def write(self, path: Path) -> None:
        """Write the file; it holds nothing but tensors, numbers and text.

        Raises:
            TrainingError: it cannot be written.
        """
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["batch"] = [_as_plain(micro_batch) for micro_batch in self.batch]
        try:
            torch.save({"format": _FORMAT, **data}, path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read the file; no code in it is run.

        Raises:
            TrainingError: it is not there, or no bundle.
        """
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise TrainingError(f"{path}: not found") from None
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise TrainingError(f"{path}: no bundle of `runkey debug-step`") from error
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT or names - set(data):
            raise TrainingError(f"{path}: no bundle of `runkey debug-step` of this version")
        return cls(**data | {"batch": tuple(Batch(**plain) for plain in data["batch"])})

    def diagnose(self, model: nn.Module | None = None) -> Diagnosis:
        """Run the step under the probe, on a GPU only if the run was and there is one.

        Args:
            model: of the same state dict, in place of the one that the parameters describe.
        """
        wanted = "auto" if self.device == "cuda" else "cpu"
        params = parse_params(
            {**self.params, "runtime": {**self.params["runtime"], "device": wanted}}
        )
        device, _ = choose_device(wanted)
        replace = Replacements(model=model)
        parts = build_training(params, self.num_classes, device, replace=replace).step
        parts.model.load_state_dict(self.model)
        if parts.precision.scaler is not None:
            parts.precision.scaler.load_state_dict(self.scaler)
        parts.model.train()
        return diagnose(parts, self.batch, seed=params.seed, step=self.step, rank=self.rank)


def _as_plain(batch: Batch) -> dict[str, Any]:
    """A batch's fields, tensors copied out of the larger ones that they may be views of."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in fields.items()}


# From a training's folder to the state right before one of its steps.

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
    """Find the nearest checkpoint in a folder from before a step (from 1).

    Raises:
        TrainingError: no checkpoint in the folder can be read.
    """
    paths = [folder / name.name for name in find_checkpoints(folder)]
    starts = [start for path in [*paths, *find_pins(folder).values()] if (start := _start(path))]
    before = [start for start in starts if start.step < step]
    if before:
        return max(before, key=lambda start: start.step)
    if not starts:
        raise TrainingError(
            f"{folder}: holds no checkpoint; train with `dvc repro`, or name a bundle "
            "(bad-step-*.pt)"
        )
    # The step is before the first checkpoint: replay from the beginning, in the same way.
    return Start(None, 0, starts[0].fingerprint)


def _start(path: Path) -> Start | None:
    try:
        facts = read_facts(path)
        return Start(path, int(facts["step"]), facts["fingerprint"])
    except (DamagedError, KeyError):
        return None


def bad_steps(folder: Path) -> list[int]:
    """List the steps that a training reported or pinned a checkpoint for, rising."""
    reports = (path.stem.removeprefix("bad-step-") for path in folder.glob(REPORTS))
    return sorted({int(text) for text in reports if text.isdigit()} | find_pins(folder).keys())


def replay(context: TrainContext, start: Start, step: int, folder: Path) -> GlobalBatch:
    """Bring model, optimizer and so on to the state before a step; return that step's batch.

    Args:
        context: of the same run, freshly built.
        start: where to begin.
        step: from 1.
        folder: the training's, for its log.

    Raises:
        TrainingError: training has no such step, or a file is damaged.
    """
    total = context.schedule.total_steps
    if not start.step < step <= total:
        raise TrainingError(f"--step {step}: training has the steps 1 to {total}")
    state = LoopState() if start.path is None else _restore(context, start.path)
    evaluations = [
        (int(entry["step"]), float(entry["values"][context.watched_metric]))
        for entry in _log_entries(folder / LOG)
        if context.watched_metric in entry.get("values", {})
    ]
    context.step.model.train()
    per_epoch = context.loader.steps_per_epoch
    while True:
        state.epoch = state.step // per_epoch
        watched = [value for at, value in evaluations if at <= state.epoch * per_epoch]
        for batch in context.loader.epoch(state.epoch, state.step - state.epoch * per_epoch):
            if state.step == step - 1:
                return split_batches(batch, state.limit)  # as it was computed
            take_step(context, state, batch, watched)


def _restore(context: TrainContext, path: Path) -> LoopState:
    try:
        _, tensors, _ = read_file(path)
    except DamagedError as error:
        raise TrainingError(f"{path}: {error}") from error
    for name, part in context.parts.items():
        part.load_state_dict(tensors["parts"][name])
    return LoopState.from_plain(tensors["state"], {})


def logged_losses(log: Path, step: int) -> dict[str, float]:
    """Read the losses of a step as the training had them; empty if they were not logged."""
    for entry in _log_entries(log):
        fields = entry.get("fields", {}) if entry.get("event") == "skipped_step" else entry
        values = fields.get("values", {})
        if fields.get("step") == step and "train/loss" in values:
            losses = {n.removeprefix("train/"): v for n, v in values.items() if "/loss" in n}
            losses.pop("loss_scale", None)
            return {name: float(value) for name, value in losses.items()}
    return {}


def _log_entries(log: Path) -> Iterator[dict[str, Any]]:
    """A log's lines, without one that was cut short when the training was killed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


# The command.


@dataclass(frozen=True)
class Debugged:
    """Result of `debug_run`."""

    diagnosis: Diagnosis
    bundle: Bundle
    start: Start
    """Where the replay began."""
    logged: dict[str, float]
    """The step's losses in the log; empty if that was not logged."""

    @property
    def comparison(self) -> str:
        """Whether the replay equals the log, in words; empty if that cannot be told."""
        losses = self.diagnosis.losses
        shared = [name for name in self.logged if name in losses]
        if not shared:
            return ""
        # As text: nan is nan.
        if all(str(self.logged[name]) == str(losses[name]) for name in shared):
            return "the losses are those of the log, to the last digit"
        was = "  ".join(f"{name} {self.logged[name]:.9g}" for name in shared)
        return f"the losses are not those of the log: {was}"


def debug_run(folder: Path, step: int, *, key: str, params: Params, root: Path) -> Debugged:
    """Replay a step of a training that was interrupted, that failed, or that still runs.

    Args:
        folder: of the training; only read.
        step: from 1.
        key: of the run.
        params: of the run.
        root: the workspace, with the prepared data.

    Raises:
        TrainingError: no checkpoint, no such step, or a damaged file.
        DataError: the data set is not prepared.
    """
    start = find_start(folder, step)
    if start.fingerprint.get("key") != key:
        raise TrainingError(f"{folder}: trained by key {start.fingerprint.get('key')}, not {key}")
    device, _ = choose_device(params.runtime.device)
    names = [one.name for one in read_classes(root / paths.PREPARED / "classes.json")]
    data = TrainData(root, names, int(start.fingerprint["micro_batch"]))
    logger.info(
        f"step {step} is replayed from "
        f"{f'{start.path.name}, after step {start.step}' if start.path else 'the start'}"
    )
    changed = differences(start.fingerprint, {"device": device.type, "world_size": 1})
    if changed:
        logger.info(f"not bit for bit: {changed}")
    loader = build_loader(params, data, device)
    replace = Replacements(loader=loader)
    context = build_training(params, len(names), device, data=data, replace=replace)
    try:
        batch = replay(context, start, step, folder)
        scaler = context.step.precision.scaler
        bundle = Bundle(
            key=key,
            step=step - 1,
            rank=0,
            params=params.model_dump(mode="json"),
            num_classes=len(names),
            model=host_weights(context.step.model),
            scaler={} if scaler is None else scaler.state_dict(),
            batch=batch,
            device=device.type,
            torch_version=str(torch.__version__),
        )
        diagnosis = diagnose(context.step, batch, seed=params.seed, step=step - 1)
    finally:
        loader.close()
    return Debugged(diagnosis, bundle, start, logged_losses(folder / LOG, step))
