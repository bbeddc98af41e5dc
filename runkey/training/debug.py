"""Replay a step of a run and find where its numbers go wrong.

It is replayed from a checkpoint in the training's folder, or from a bundle (`bad-step-STEP.pt`), a
small file that replays where there is neither data set nor checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch
from runkey.errors import TrainingError
from runkey.params import Params, parse_params
from runkey.training.build import (
    Replacements,
    TrainContext,
    TrainData,
    build_loader,
    build_training,
)
from runkey.training.checkpoint import (
    DamagedError,
    differences,
    find_checkpoints,
    read_facts,
    read_file,
)
from runkey.training.device import choose_device
from runkey.training.guard import REPORTS, find_pins
from runkey.training.loop import take_step
from runkey.training.probe import Diagnosis, diagnose
from runkey.training.state import LoopState
from runkey.training.step import TrainStep, split_batches
from runkey.training.tensors import host_weights

logger = logging.getLogger(__name__)

# Bundles.

_FORMAT = "runkey bad step 1"


@dataclass(frozen=True)
class Bundle:
    """Everything that a step's forward and backward passes depend on."""

    key: str
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
        data = vars(self) | {"batch": [_as_plain(micro_batch) for micro_batch in self.batch]}
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


def _as_plain(batch: Batch) -> dict[str, Any]:
    """A batch's fields, tensors copied out of the larger ones that they may be views of."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in fields.items()}


def diagnose_bundle(bundle: Bundle, model: nn.Module | None = None) -> Diagnosis:
    """Run a bundle's step under the probe, on a GPU only if the run was and there is one.

    A model of the same state dict takes the place of the one that the parameters describe.
    """
    parts = build_bundled_step(bundle, model)
    seed = bundle.params["seed"]
    return diagnose(parts, bundle.batch, seed=seed, step=bundle.step, rank=bundle.rank)


def build_bundled_step(bundle: Bundle, model: nn.Module | None = None) -> TrainStep:
    """Build what a bundle's step works with, in the state before the step."""
    wanted = "auto" if bundle.device == "cuda" else "cpu"
    runtime = {**bundle.params["runtime"], "device": wanted}
    params = parse_params({**bundle.params, "runtime": runtime})
    device, _ = choose_device(wanted)
    replace = Replacements(model=model)
    parts = build_training(params, bundle.num_classes, device, replace=replace).step
    parts.model.load_state_dict(bundle.model)
    if parts.precision.scaler is not None:
        parts.precision.scaler.load_state_dict(bundle.scaler)
    parts.model.train()
    return parts


def build_bundle(folder: Path, step: int, *, key: str, params: Params, root: Path) -> Bundle:
    """Replay a training that was interrupted, that failed, or that still runs, up to a step.

    Its folder is only read. Steps count from 1.

    Raises:
        TrainingError: no checkpoint, no such step, or a damaged file.
        DataError: the data set is not prepared.
    """
    start = find_start(folder, step)
    if start.fingerprint.get("key") != key:
        raise TrainingError(f"{folder}: trained by key {start.fingerprint.get('key')}, not {key}")
    device, _ = choose_device(params.runtime.device)
    data = TrainData.read(root, int(start.fingerprint["micro_batch"]))
    logger.info(
        f"step {step} is replayed from "
        f"{f'{start.path.name}, after step {start.step}' if start.path else 'the start'}"
    )
    changed = differences(start.fingerprint, {"device": device.type, "world_size": 1})
    if changed:
        logger.info(f"not bit for bit: {changed}")
    loader = build_loader(params, data, device)
    replace = Replacements(loader=loader)
    context = build_training(params, len(data.class_names), device, data=data, replace=replace)
    try:
        batch = replay(context, start, step, folder)
    finally:
        loader.close()
    scaler = context.step.precision.scaler
    return Bundle(
        key=key,
        step=step - 1,
        rank=0,
        params=params.model_dump(mode="json"),
        num_classes=len(data.class_names),
        model=host_weights(context.step.model),
        scaler={} if scaler is None else scaler.state_dict(),
        batch=batch,
        device=device.type,
        torch_version=str(torch.__version__),
    )


# From a training's folder to the state right before one of its steps.

LOG = "train.jsonl"
"""In a training's folder: the log that it writes as it goes."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a replay begins: a checkpoint, or the start of training."""

    path: Path | None
    step: int
    fingerprint: Mapping[str, Any]


def find_start(folder: Path, step: int) -> Start:
    """Find the nearest checkpoint in a folder from before a step (from 1).

    Raises:
        TrainingError: no checkpoint in the folder can be read.
    """
    starts = []
    paths = [folder / name.name for name in find_checkpoints(folder)]
    for path in [*paths, *find_pins(folder).values()]:
        with suppress(DamagedError, KeyError):
            facts = read_facts(path)
            starts.append(Start(path, int(facts["step"]), facts["fingerprint"]))
    if not starts:
        raise TrainingError(
            f"{folder}: holds no checkpoint; train with `dvc repro`, or name a bundle "
            "(bad-step-*.pt)"
        )
    # Before the first checkpoint, it is replayed from the beginning, in the same way.
    before = [start for start in starts if start.step < step]
    beginning = Start(None, 0, starts[0].fingerprint)
    return max([*before, beginning], key=lambda start: start.step)


def bad_steps(folder: Path) -> list[int]:
    """List the steps that a training reported or pinned a checkpoint for, rising."""
    reports = (path.stem.removeprefix("bad-step-") for path in folder.glob(REPORTS))
    return sorted({int(text) for text in reports if text.isdigit()} | find_pins(folder).keys())


def replay(context: TrainContext, start: Start, step: int, folder: Path) -> GlobalBatch:
    """Bring model, optimizer and so on to the state before a step; return that step's batch.

    The context is of the same run, freshly built; the folder is the training's, for its log.

    Raises:
        TrainingError: training has no such step, or a file is damaged.
    """
    total = context.schedule.total_steps
    if not start.step < step <= total:
        raise TrainingError(f"--step {step}: training has the steps 1 to {total}")
    state = LoopState()
    if start.path is not None:
        try:
            _, tensors, _ = read_file(start.path)
        except DamagedError as error:
            raise TrainingError(f"{start.path}: {error}") from error
        context.restore(tensors["parts"])
        state = LoopState.from_plain(tensors["state"], {})
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


def compare_with_log(losses: Mapping[str, float], logged: Mapping[str, float]) -> str:
    """Say whether a replay equals the log; empty if that cannot be told."""
    shared = [name for name in logged if name in losses]
    if not shared:
        return ""
    # As text: nan is nan.
    if all(str(logged[name]) == str(losses[name]) for name in shared):
        return "the losses are those of the log, to the last digit"
    was = "  ".join(f"{name} {logged[name]:.9g}" for name in shared)
    return f"the losses are not those of the log: {was}"


def _log_entries(log: Path) -> Iterator[dict[str, Any]]:
    """A log's lines, without one that was cut short when the training was killed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry
