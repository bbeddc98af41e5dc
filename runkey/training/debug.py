"""Replay a step of a run under a probe, and find the first place where its numbers go wrong.

It is replayed from a checkpoint in the training's folder, or from a bundle (`bad-step-STEP.pt`), a
small file that replays where there is neither data set nor checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch, normalise
from runkey.errors import TrainingError
from runkey.files import parse_json, replacing
from runkey.params import Params, parse_params
from runkey.paths import TRAIN_LOG
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
from runkey.training.state import LoopState
from runkey.training.step import TrainStep, accumulate_gradients, image_ids_of, split_batches
from runkey.training.tensors import all_finite, host_weights, map_tensors, named_tensors

logger = logging.getLogger(__name__)

Where = Literal["weights", "image", "targets", "forward", "loss", "backward", "nowhere"]

_HEADLINES = {
    "weights": "the weights were not finite before this step: {module}",
    "image": "the input is not finite before the model sees it",
    "targets": "the true boxes are not what they should be",
    "forward": "forward pass: {module} ({kind}) takes finite numbers and gives others",
    "loss": "the loss: predictions and targets are finite, {module} is not",
    "backward": "backward pass: {module} ({kind}) takes finite gradients and gives others",
    "nowhere": "everything in this step is finite",
}


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """Numbers about a tensor. Least, greatest and so on are of its finite elements."""

    shape: tuple[int, ...]
    dtype: str
    nan: int
    inf: int
    least: float
    """NaN, like the others, if no element is finite."""
    greatest: float
    mean: float
    greatest_absolute: float

    @property
    def is_finite(self) -> bool:
        """Whether there is neither NaN nor infinity."""
        return not self.nan + self.inf

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape)) or "scalar"
        bad = f"{self.nan} NaN, {self.inf} inf" if not self.is_finite else "finite"
        return (
            f"{self.dtype} [{size}]  {bad}  min {self.least:.4g}  max {self.greatest:.4g}  "
            f"mean {self.mean:.4g}  absmax {self.greatest_absolute:.4g}"
        )


Summaries = dict[str, TensorSummary]
"""Of tensors, by their names."""


@torch.no_grad()
def _summarise(tensor: Tensor) -> TensorSummary:
    values = tensor[tensor.isfinite()].double()
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    least = greatest = mean = absolute = float("nan")
    if values.numel():
        least, greatest = float(values.min()), float(values.max())
        mean, absolute = float(values.mean()), max(abs(least), abs(greatest))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSummary(tuple(tensor.shape), dtype, nan, inf, least, greatest, mean, absolute)


def _summaries(value: Any) -> Summaries:
    """Summarise the floating tensors in nested dicts, tuples and dataclasses, by their places."""
    tensors = named_tensors(value)
    return {place: _summarise(tensor) for place, tensor in tensors if tensor.is_floating_point()}


def _are_finite(summaries: Summaries) -> bool:
    return all(summary.is_finite for summary in summaries.values())


@dataclass(frozen=True, slots=True)
class DebugFinding:
    """The first place where something that is not finite came out of finite numbers."""

    where: Where
    module: str = ""
    """Its name in the model; of the loss, its parts; of the weights, the tensor."""
    kind: str = ""
    """Its class."""
    micro_batch: int | None = None
    """Which of the global batch's, from 1; None: it does not matter."""
    image_ids: tuple[int, ...] = ()
    """COCO ids of that micro-batch, or of the images in it that are concerned."""
    tensors: Summaries = field(default_factory=dict)
    """What went in, what came out, the module's own."""

    def lines(self) -> list[str]:
        """Describe it: the place first, then the numbers."""
        lines = [_HEADLINES[self.where].format(module=self.module or "the model", kind=self.kind)]
        if self.micro_batch is not None:
            ids = ", ".join(map(str, self.image_ids))
            lines.append(f"  micro-batch {self.micro_batch}, images {ids}")
        width = max(map(len, self.tensors), default=0)
        return lines + [f"  {name:<{width}}  {summary}" for name, summary in self.tensors.items()]


def _bad_rows(tensor: Tensor, image_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the ids of the images whose rows of a tensor [B, ...] are not finite."""
    return _not_among(image_ids, tensor.detach().isfinite().flatten(1).all(1))


def _not_among(image_ids: Sequence[int], good: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(i for i, fine in zip(image_ids, good, strict=True) if not fine)


@dataclass
class _Call:
    module: str
    own: nn.Module
    micro_batch: int
    inputs: Summaries
    outputs: Summaries = field(default_factory=dict)
    grad_outputs: Summaries = field(default_factory=dict)

    def finding(self, where: Where, tensors: Summaries, ids: tuple[int, ...]) -> DebugFinding:
        own: dict[str, Tensor] = dict(self.own.named_parameters(recurse=False))
        own |= dict(self.own.named_buffers(recurse=False))
        kind, tensors = type(self.own).__name__, tensors | _summaries(own)
        return DebugFinding(where, self.module, kind, self.micro_batch, ids, tensors)


class Probe:
    """Watches what goes into and comes out of every module, forward and backward.

    A module is watched by forward hooks. One without a `forward` of its own is called through its
    methods, so these are wrapped instead. If arithmetic between modules goes wrong, the module that
    does it is named: the innermost whose inputs were finite and whose outputs are not.

    Gradients are read by hooks on copies of the inputs and outputs: a tensor that several modules
    take has one gradient for all of them, its copies have one for each. Torch's own backward hooks
    take neither dataclasses nor in-place operations behind them.

    It takes the place of the criterion, which it watches, too.
    """

    def __init__(self, parts: TrainStep, batch: GlobalBatch) -> None:
        self._model, self._criterion, self._batch = parts.model, parts.criterion, batch
        self.normaliser = parts.criterion.normaliser
        self._running: list[_Call] = []
        self._done: dict[nn.Module, list[_Call]] = defaultdict(list)
        self._forward: DebugFinding | None = None
        self._backward: DebugFinding | None = None
        self._in_backward = False
        self._micro_batch = 0
        """The current one, from 1."""

    @property
    def finding(self) -> DebugFinding:
        """The first place; what the forward pass gave explains the backward pass."""
        return self._forward or self._backward or DebugFinding("nowhere")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model's modules until the block ends."""
        with ExitStack() as undo:
            for name, module in self._model.named_modules():
                before = partial(self._before, name)
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                undo.callback(handle.remove)
                undo.callback(module.register_forward_hook(self._after).remove)
                for method in _entry_methods(module):
                    setattr(module, method, self._wrapped(name, module, getattr(module, method)))
                    undo.callback(delattr, module, method)
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad:
                    hook = partial(self._parameter_gradient, name)
                    handle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
                    undo.callback(handle.remove)
            yield

    def __call__(self, outputs: Any, targets: Any, normaliser: Any) -> Any:
        """Compute the losses as the criterion does."""
        losses = self._criterion(outputs, targets, normaliser)
        named = {**losses.parts, "total": losses.total.detach()}
        bad = [name for name, value in named.items() if not value.isfinite()]
        inputs = _summaries({"output": outputs, "targets": targets})
        if bad and _are_finite(inputs) and self._forward is None:
            names = ", ".join(name for name in bad if name != "total" or len(bad) == 1)
            tensors = inputs | _summaries(named)
            self._forward = DebugFinding(
                "loss", names, "criterion", self._micro_batch, self._image_ids, tensors
            )
        return losses

    @property
    def _image_ids(self) -> tuple[int, ...]:
        """Of the current micro-batch; of the batch, if memory ran out and it was split."""
        if self._micro_batch <= len(self._batch):
            return self._batch[self._micro_batch - 1].image_ids
        return image_ids_of(self._batch)

    def _wrapped(
        self, name: str, module: nn.Module, method: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            args, options = self._before(name, module, args, options)
            return self._after(module, args, method(*args, **options))

        return call

    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module is self._model:
            self._micro_batch, self._in_backward = self._micro_batch + 1, False
            # Recomputation (activation checkpointing) ends in the middle of a module.
            self._running.clear()
            self._done.clear()
        named = {**{f"input {i}": value for i, value in enumerate(args)}, **options}
        inputs = {} if self._in_backward else _summaries(named)
        call = _Call(name, module, self._micro_batch, inputs)
        self._running.append(call)
        tapped = map_tensors((args, options), partial(_tap, self._gradient_leaves, call))
        return tapped[0], tapped[1]

    def _after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        call = self._running.pop()
        if not self._in_backward:
            call.outputs = _summaries({"output": output})
            self._done[module].append(call)
            if not self._forward and _are_finite(call.inputs) and not _are_finite(call.outputs):
                ids = self._images_of(output)
                self._forward = call.finding("forward", call.inputs | call.outputs, ids)
        return map_tensors(output, partial(_tap, self._gradient_enters, call))

    def _gradient_enters(self, call: _Call, gradient: Tensor) -> None:
        self._in_backward = True
        call.grad_outputs[f"grad of output {len(call.grad_outputs)}"] = _summarise(gradient)
        if call.own is self._model and not _are_finite(call.grad_outputs) and not self._backward:
            tensors = call.outputs | call.grad_outputs
            self._backward = DebugFinding(
                "backward", "the loss", "criterion", call.micro_batch, self._image_ids, tensors
            )

    def _gradient_leaves(self, call: _Call, gradient: Tensor) -> None:
        self._compare(call, "grad of input", gradient, [call])

    def _parameter_gradient(self, name: str, gradient: Tensor) -> None:
        owner, _, own_name = name.rpartition(".")
        calls = self._done[self._model.get_submodule(owner)]
        if calls:
            self._compare(calls[-1], f"grad of {own_name}", gradient, calls)

    def _compare(self, call: _Call, name: str, gradient: Tensor, calls: Sequence[_Call]) -> None:
        """Blame a call for its first gradient that is not finite, if all that came in were."""
        summary = _summarise(gradient)
        came_in_finite = all(_are_finite(one.grad_outputs) for one in calls)
        if not self._backward and not summary.is_finite and came_in_finite:
            tensors = call.inputs | call.outputs | call.grad_outputs | {name: summary}
            self._backward = call.finding("backward", tensors, self._image_ids)

    def _images_of(self, output: Any) -> tuple[int, ...]:
        """The images whose rows are not finite, if rows are images; else all of them."""
        ids = self._image_ids
        for _, tensor in named_tensors(output):
            is_per_image = tensor.ndim > 1 and len(tensor) == len(ids)
            if is_per_image and (bad := _bad_rows(tensor, ids)):  # integers are all finite
                return bad
        return ids


def _tap(note: Callable[[_Call, Tensor], None], call: _Call, tensor: Tensor) -> Tensor:
    if not (tensor.requires_grad and tensor.is_floating_point() and torch.is_grad_enabled()):
        return tensor
    tapped = tensor.clone()
    tapped.register_hook(partial(note, call))  # type: ignore[no-untyped-call]
    return tapped


def _entry_methods(module: nn.Module) -> list[str]:
    """Names of the methods that replace a missing `forward`."""
    if type(module).forward is not nn.Module.forward:
        return []
    ours = [vars(c) for c in type(module).__mro__ if c.__module__.startswith("runkey.")]
    methods = {n for own in ours for n, item in own.items() if isinstance(item, FunctionType)}
    return sorted(n for n in methods - set(dir(nn.Module)) if not n.startswith("_"))


# True boxes are fractions of an image; one that reaches this far is none.
_FAR = 2.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of a replayed step."""

    finding: DebugFinding
    losses: dict[str, float]
    """`loss` and `loss_<part>` of the global batch, to be compared with the log."""


def diagnose(
    parts: TrainStep, batch: GlobalBatch, *, seed: int, step: int, rank: int = 0
) -> Diagnosis:
    """Run a step's forward and backward passes; weights and moments are not changed.

    Its parts are in the state before it, which `step` steps were done before, by this rank.
    """
    broken = _broken_before(parts, batch)
    probe = Probe(parts, batch)
    criterion: Any = probe
    watched = replace(parts, criterion=criterion)
    parts.optimizer.zero_grad()
    with probe.watching():
        losses = accumulate_gradients(
            watched, batch, reseed=partial(parts.reseed, seed, step, rank)
        )
    parts.statistics.restore(losses.statistics, torch.ones((), device=parts.device))
    parts.optimizer.zero_grad()
    values = {name: float(value) for name, value in losses.values.items()}
    return Diagnosis(broken or probe.finding, values)


def _broken_before(parts: TrainStep, batch: GlobalBatch) -> DebugFinding | None:
    for name, tensor in parts.model.state_dict().items():
        if not all_finite([tensor]):
            return DebugFinding("weights", name, tensors={name: _summarise(tensor)})
    for number, micro_batch in enumerate(batch, start=1):
        images, _ = normalise(micro_batch, parts.normalisation, channels_last=parts.channels_last)
        if bad := _bad_rows(images, micro_batch.image_ids):
            return DebugFinding("image", "", "", number, bad, _summaries({"images": images}))
        boxes, counts = micro_batch.boxes_cxcywh, list(micro_batch.counts)
        good = [part.all() for part in torch.split((boxes.abs() <= _FAR).all(1), counts)]
        if bad := _not_among(micro_batch.image_ids, good):
            return DebugFinding("targets", "", "", number, bad, _summaries({"boxes_cxcywh": boxes}))
    return None


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
        """Write the file, of tensors, numbers and text; raise TrainingError if that fails."""
        data = vars(self) | {"batch": [_as_plain(micro_batch) for micro_batch in self.batch]}
        try:
            with replacing(path) as temporary:
                torch.save({"format": _FORMAT, **data}, temporary)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read the file, or raise TrainingError; no code in it is run."""
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
    wanted = "auto" if bundle.device == "cuda" else "cpu"
    runtime = {**bundle.params["runtime"], "device": wanted}
    params = parse_params({**bundle.params, "runtime": runtime})
    device, given = choose_device(wanted)[0], Replacements(model=model)
    parts = build_training(params, bundle.num_classes, device, replace=given).step
    parts.model.load_state_dict(bundle.model)
    if parts.precision.scaler is not None:
        parts.precision.scaler.load_state_dict(bundle.scaler)
    parts.model.train()
    return diagnose(parts, bundle.batch, seed=params.seed, step=bundle.step, rank=bundle.rank)


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
    given = Replacements(loader=loader)
    context = build_training(params, len(data.class_names), device, data=data, replace=given)
    with closing(loader):
        batch = replay(context, start, step, folder)
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


@dataclass(frozen=True, slots=True)
class Start:
    """Where a replay begins: a checkpoint, or the start of training."""

    path: Path | None
    step: int
    fingerprint: Mapping[str, Any]


def find_start(folder: Path, step: int) -> Start:
    """Find the nearest checkpoint before a step (from 1); TrainingError if none can be read."""
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

    The context is of the same run, freshly built; the folder is the training's, for its log. Raises
    TrainingError if training has no such step, or a file is damaged.
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
        for entry in _log_entries(folder / TRAIN_LOG.name)
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
            names = [n for n in values if "/loss" in n and n != "train/loss_scale"]
            return {name.removeprefix("train/"): float(values[name]) for name in names}
    return {}


def compare_with_log(losses: Mapping[str, float], logged: Mapping[str, float]) -> str:
    """Say whether a replay equals the log; empty if that cannot be told."""
    shared = logged.keys() & losses.keys()
    if all(str(logged[name]) == str(losses[name]) for name in shared):  # as text: nan is nan
        return "the losses are those of the log, to the last digit" if shared else ""
    was = "  ".join(f"{name} {value:.9g}" for name, value in logged.items() if name in shared)
    return f"the losses are not those of the log: {was}"


def _log_entries(log: Path) -> Iterator[dict[str, Any]]:
    """A log's lines, without one that was cut short when the training was killed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            entry = parse_json(line)
            if isinstance(entry, dict):
                yield entry
