"""A step of the run in a workspace: replayed, looked at, and put into a bundle."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runkey import paths
from runkey.data.dataset import Batch, GlobalBatch
from runkey.data.index import read_classes
from runkey.data.loader import TrainLoader, build_train_loader
from runkey.data.normalise import normalise
from runkey.errors import TrainingError
from runkey.model.build import build_model
from runkey.model.criterion import build_criterion
from runkey.model.weights import load_initial_weights
from runkey.params import Params, parse_params
from runkey.training.build import Setup, build_setup
from runkey.training.checkpoint.file import DamagedError, find_saved, read_facts, read_file
from runkey.training.debug.probe import Finding, Probe, floating, numbers_of
from runkey.training.device import choose_device, seed_step, set_up
from runkey.training.distributed import World
from runkey.training.guard import REPORTS, find_pins
from runkey.training.loop import take_step
from runkey.training.metrics import Quiet
from runkey.training.split import cut
from runkey.training.state import LoopState, host_weights
from runkey.training.step import TrainStep, accumulate_gradients

# A step in one small file, which replays where there is neither data set nor checkpoint.


_FORMAT = "runkey bad step 1"


@dataclass(frozen=True)
class Bundle:
    """All that a step's forward and backward passes depend on."""

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
    window: GlobalBatch
    device: str
    """cpu or cuda: where the run was trained."""
    torch_version: str

    def write(self, path: Path) -> None:
        """Write the file; nothing but tensors, numbers and text is in it.

        Raises:
            TrainingError: it cannot be written.
        """
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["window"] = [_as_plain(batch) for batch in self.window]
        try:
            torch.save({"format": _FORMAT, **content}, path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read the file, in which no code is run.

        Raises:
            TrainingError: it is not there, or no bundle.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise TrainingError(f"{path}: not found") from None
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise TrainingError(f"{path}: no bundle of `runkey debug-step`") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise TrainingError(f"{path}: no bundle of `runkey debug-step` of this version")
        window = tuple(Batch(**_from_plain(batch)) for batch in content.pop("window"))
        return cls(**content, window=window)

    def parsed_params(self) -> Params:
        """The run's parameters, on a GPU only if the run was and there is one."""
        device = "auto" if self.device == "cuda" else "cpu"
        plain = {**self.params, "runtime": {**self.params["runtime"], "device": device}}
        return parse_params(plain)

    def diagnose(self, model: nn.Module | None = None) -> Diagnosis:
        """Run the step under the probe.

        Args:
            model: of the same state dict, in place of the one that the parameters describe.
        """
        params = self.parsed_params()
        machinery = build_setup(
            model or build_model(params.model, self.num_classes),
            build_criterion(params.model, self.num_classes),
            _OneWindow(self.window),
            lambda _: {},
            params,
            device=choose_device(params.runtime.device)[0],
            tracker=Quiet(),
            say=lambda _: None,
            world=World(),
        ).machinery
        machinery.model.load_state_dict(self.model)
        if machinery.precision.scaler is not None:
            machinery.precision.scaler.load_state_dict(self.scaler)
        machinery.model.train()
        return diagnose(machinery, self.window, seed=params.seed, step=self.step, rank=self.rank)


class _OneWindow:
    """Stands for a loader: there is one step."""

    steps_per_epoch = 1

    def __init__(self, window: GlobalBatch) -> None:
        self._window = window

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:  # noqa: ARG002
        """The window."""
        yield self._window


def _as_plain(batch: Batch) -> dict[str, Any]:
    """A batch's fields, tensors copied out of the larger ones that they may be views of."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in fields.items()}


def _from_plain(fields: dict[str, Any]) -> dict[str, Any]:
    # torch.load gives tuples back as what they were; lists are for files of other makers.
    return {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}


# One step under the probe: the first place at which it is not finite.


# True boxes are parts of an image; one that reaches this far is none.
_FAR = 2.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a replayed step gave."""

    finding: Finding
    losses: dict[str, float]
    """`loss` and `loss_<part>` of the window, to be compared with what was logged."""


class _WatchedCriterion:
    """A criterion that shows its losses to a probe."""

    def __init__(self, criterion: Any, probe: Probe) -> None:
        self._criterion, self._probe = criterion, probe
        self.normaliser = criterion.normaliser

    def __call__(self, outputs: Any, targets: Any, normaliser: Any) -> Any:
        losses = self._criterion(outputs, targets, normaliser)
        named = {**losses.parts, "total": losses.total.detach()}
        bad = [name for name, value in named.items() if not value.isfinite()]
        seen = {**dict(floating({"output": outputs, "targets": targets})), **named}
        numbers = {name: numbers_of(tensor) for name, tensor in seen.items()}
        number = self._probe.micro_batch
        if bad and all(numbers[name].is_finite for name in seen if name not in named):
            names = ", ".join(name for name in bad if name != "total" or len(bad) == 1)
            ids = self._probe.image_ids
            self._probe.found(Finding("loss", names, "criterion", number, ids, numbers))
        return losses


def diagnose(
    machinery: TrainStep, window: GlobalBatch, *, seed: int, step: int, rank: int = 0
) -> Diagnosis:
    """Run a step's forward and backward passes; weights and moments are not changed.

    Args:
        machinery: in the state before the step, its model in training mode.
        window: the step's images.
        seed: of the run.
        step: steps done before this one.
        rank: of the process whose step it is.
    """
    broken = _before(machinery.model, window, machinery.channels_last)
    probe = Probe(machinery.model, window)
    watched = replace(
        machinery,
        criterion=_WatchedCriterion(machinery.criterion, probe),  # type: ignore[arg-type]
    )
    machinery.gradients.clear()
    with probe.watching():
        losses = accumulate_gradients(watched, window, reseed=partial(seed_step, seed, step, rank))
    machinery.statistics.restore(losses.statistics, torch.ones((), device=machinery.device))
    machinery.gradients.clear()
    finding = broken or probe.finding or Finding("nowhere")
    return Diagnosis(finding, {name: float(value) for name, value in losses.values.items()})


def _before(model: nn.Module, window: GlobalBatch, channels_last: bool) -> Finding | None:
    """What is wrong before the step computes anything."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            numbers = numbers_of(tensor)
            if not numbers.is_finite:
                return Finding("weights", name, tensors={name: numbers})
    for number, batch in enumerate(window, start=1):
        images, _ = normalise(batch, channels_last=channels_last)
        rows = images.isfinite().flatten(1).all(1).tolist()
        bad = tuple(i for i, fine in zip(batch.image_ids, rows, strict=True) if not fine)
        if bad:
            seen = {"images": numbers_of(images)}
            return Finding("image", "", "", number, bad, seen)
        bad = _with_bad_boxes(batch)
        if bad:
            seen = {"boxes_cxcywh": numbers_of(batch.boxes_cxcywh)}
            return Finding("targets", "", "", number, bad, seen)
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


def replay(setup: Setup, start: Start, step: int, folder: Path) -> GlobalBatch:
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


@dataclass(frozen=True)
class Debugged:
    """What came of it."""

    diagnosis: Diagnosis
    bundle: Bundle
    start: Start
    """Where the replay began."""
    logged: dict[str, float]
    """The step's losses as they were; empty if that was not logged."""

    @property
    def comparison(self) -> str:
        """Whether the replay is what was, in words; empty if that cannot be told."""
        losses = self.diagnosis.losses
        shared = [name for name in self.logged if name in losses]
        if not shared:
            return ""
        # As text: nan is nan.
        if all(str(self.logged[name]) == str(losses[name]) for name in shared):
            return "the losses are those of the log, to the last digit"
        was = "  ".join(f"{name} {self.logged[name]:.9g}" for name in shared)
        return f"the losses are not those of the log: {was}"


def debug_run(
    folder: Path,
    step: int,
    *,
    key: str,
    params: Params,
    root: Path,
    say: Callable[[str], None],
) -> Debugged:
    """Replay a step of a training that was interrupted, that failed, or that still runs.

    Args:
        folder: of the training; only read.
        step: from 1.
        key: of the run.
        params: of the run.
        root: the workspace, with the prepared data.
        say: told how it goes.

    Raises:
        TrainingError: no checkpoint, no such step, or a damaged file.
        DataError: the data set is not prepared.
    """
    start = find_start(folder, step)
    if start.fingerprint.get("key") != key:
        raise TrainingError(f"{folder}: trained by key {start.fingerprint.get('key')}, not {key}")
    loader = build_train_loader(params, root, int(start.fingerprint["micro_batch"]))
    setup, num_classes = _build(params, root, loader)
    whence = f"{start.path.name}, after step {start.step}" if start.path else "the start"
    say(f"step {step} is replayed from {whence}")
    differing = _differing(start, setup)
    if differing:
        say(f"not bit for bit: {differing}")
    try:
        window = replay(setup, start, step, folder)
        bundle = _bundle(setup, step, key, num_classes, window)
        machinery = setup.machinery
        diagnosis = diagnose(machinery, window, seed=params.seed, step=step - 1)
    finally:
        loader.close()
    log = folder / LOG
    logged = logged_losses(log, step) if log.is_file() else {}
    return Debugged(diagnosis, bundle, start, logged)


def _build(params: Params, root: Path, loader: TrainLoader) -> tuple[Setup, int]:
    """The training as it was built at its start, and the number of classes."""
    training = params.training
    device, _ = choose_device(params.runtime.device)
    set_up(params.seed, deterministic=training.deterministic, cpu_threads=training.cpu_threads)
    names = [one.name for one in read_classes(root / paths.PREPARED / "classes.json")]
    model = build_model(params.model, len(names))
    load_initial_weights(model, params.model, names, root)
    setup = build_setup(
        model,
        build_criterion(params.model, len(names)),
        loader,
        lambda _: {},
        params,
        device=device,
        tracker=Quiet(),
        say=lambda _: None,
        world=World(),
    )
    return setup, len(names)


def _differing(start: Start, setup: Setup) -> str:
    """What is not as it was, and moves bits: in words."""
    here = {"device": setup.machinery.device.type, "world_size": 1}
    there = start.fingerprint
    pairs = [f"{name} {there[name]} -> {here[name]}" for name in here if there[name] != here[name]]
    return ", ".join(pairs)


def _bundle(setup: Setup, step: int, key: str, num_classes: int, window: GlobalBatch) -> Bundle:
    scaler = setup.machinery.precision.scaler
    return Bundle(
        key=key,
        step=step - 1,
        rank=0,
        params=setup.params.model_dump(mode="json"),
        num_classes=num_classes,
        model=host_weights(setup.machinery.model),
        scaler={} if scaler is None else scaler.state_dict(),
        window=window,
        device=setup.machinery.device.type,
        torch_version=str(torch.__version__),
    )
