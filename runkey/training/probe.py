"""Compute a step's losses and gradients under a probe: the first place that is not finite."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch
from runkey.data.normalise import normalise
from runkey.training.device import seed_step
from runkey.training.step import TrainStep, accumulate_gradients, image_ids_of
from runkey.training.tensors import all_finite, map_tensors, named_tensors

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
    good = tensor.detach().isfinite().flatten(1).all(1).tolist()
    return tuple(i for i, fine in zip(image_ids, good, strict=True) if not fine)


# The probe.


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
    def finding(self) -> DebugFinding | None:
        """The first place; what the forward pass gave explains the backward pass."""
        return self._forward or self._backward

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
            if tensor.is_floating_point() and tensor.ndim > 1 and len(tensor) == len(ids):
                bad = _bad_rows(tensor, ids)
                if bad:
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


# One step under the probe.

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
    broken = _before(parts.model, batch, parts.channels_last)
    probe = Probe(parts, batch)
    criterion: Any = probe
    watched = replace(parts, criterion=criterion)
    parts.optimizer.zero_grad()
    with probe.watching():
        losses = accumulate_gradients(watched, batch, reseed=partial(seed_step, seed, step, rank))
    parts.statistics.restore(losses.statistics, torch.ones((), device=parts.device))
    parts.optimizer.zero_grad()
    finding = broken or probe.finding or DebugFinding("nowhere")
    return Diagnosis(finding, {name: float(value) for name, value in losses.values.items()})


def _before(model: nn.Module, batch: GlobalBatch, channels_last: bool) -> DebugFinding | None:
    """What is wrong before the step computes anything."""
    for name, tensor in model.state_dict().items():
        if not all_finite([tensor]):
            return DebugFinding("weights", name, tensors={name: _summarise(tensor)})
    for number, micro_batch in enumerate(batch, start=1):
        images, _ = normalise(micro_batch, channels_last=channels_last)
        bad = _bad_rows(images, micro_batch.image_ids)
        if bad:
            return DebugFinding("image", "", "", number, bad, _summaries({"images": images}))
        bad = _with_bad_boxes(micro_batch)
        if bad:
            boxes = {"boxes_cxcywh": micro_batch.boxes_cxcywh}
            return DebugFinding("targets", "", "", number, bad, _summaries(boxes))
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
