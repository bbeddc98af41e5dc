"""Watch everything that goes into and comes out of every module, forward and backward.

A module is watched by forward hooks. One without a `forward` of its own is called through its
methods, so these are wrapped instead. If arithmetic between modules goes wrong, the module that
does it is named: the innermost whose inputs were finite and whose outputs are not.

Gradients are read by hooks on copies of the inputs and outputs: a tensor that several modules take
has one gradient for all of them, its copies have one for each. Torch's own backward hooks take
neither dataclasses nor in-place operations behind them.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runkey.data.dataset import GlobalBatch
from runkey.training.guard import json_safe
from runkey.training.step import image_ids_of
from runkey.training.tensors import map_tensors, named_tensors

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
    tensors: dict[str, TensorSummary] = field(default_factory=dict)
    """What went in, what came out, the module's own."""

    def lines(self) -> list[str]:
        """Describe it: the place first, then the numbers."""
        lines = [_HEADLINES[self.where].format(module=self.module or "the model", kind=self.kind)]
        if self.micro_batch is not None:
            ids = ", ".join(map(str, self.image_ids))
            lines.append(f"  micro-batch {self.micro_batch}, images {ids}")
        width = max(map(len, self.tensors), default=0)
        return lines + [f"  {name:<{width}}  {summary}" for name, summary in self.tensors.items()]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        plain: dict[str, Any] = json_safe(asdict(self))
        return plain


@torch.no_grad()
def summarise(tensor: Tensor) -> TensorSummary:
    """Summarise a floating tensor; waits for its device."""
    values = tensor[tensor.isfinite()].double()
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    least = greatest = mean = absolute = float("nan")
    if values.numel():
        least, greatest = float(values.min()), float(values.max())
        mean, absolute = float(values.mean()), max(abs(least), abs(greatest))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSummary(tuple(tensor.shape), dtype, nan, inf, least, greatest, mean, absolute)


def summaries(value: Any) -> dict[str, TensorSummary]:
    """Summarise the floating tensors in nested dicts, tuples and dataclasses, by their places."""
    tensors = named_tensors(value)
    return {place: summarise(tensor) for place, tensor in tensors if tensor.is_floating_point()}


def bad_rows(tensor: Tensor, image_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the ids of the images whose rows of a tensor [B, ...] are not finite."""
    good = tensor.detach().isfinite().flatten(1).all(1).tolist()
    return tuple(i for i, fine in zip(image_ids, good, strict=True) if not fine)


@dataclass
class _Call:
    """One call of a module, or of a method of it."""

    module: str
    own: nn.Module
    micro_batch: int
    inputs: dict[str, TensorSummary]
    outputs: dict[str, TensorSummary] = field(default_factory=dict)
    grad_outputs: dict[str, TensorSummary] = field(default_factory=dict)

    @property
    def got_finite_gradients(self) -> bool:
        return all(summary.is_finite for summary in self.grad_outputs.values())

    def finding(
        self, where: Where, tensors: dict[str, TensorSummary], ids: tuple[int, ...]
    ) -> DebugFinding:
        own: dict[str, Tensor] = dict(self.own.named_parameters(recurse=False))
        own |= dict(self.own.named_buffers(recurse=False))
        kind = type(self.own).__name__
        return DebugFinding(
            where, self.module, kind, self.micro_batch, ids, tensors | summaries(own)
        )


class Probe:
    """Finds the first place in a step that is not finite; see the module's docstring."""

    def __init__(self, model: nn.Module, batch: GlobalBatch) -> None:
        """Watch nothing yet; `watching` does."""
        self._model, self._batch = model, batch
        self._running: list[_Call] = []
        self._done: dict[nn.Module, list[_Call]] = defaultdict(list)
        self._forward: DebugFinding | None = None
        self._backward: DebugFinding | None = None
        self._in_backward = False
        self.micro_batch = 0
        """The current one, from 1."""

    @property
    def finding(self) -> DebugFinding | None:
        """The first place; what the forward pass gave explains the backward pass."""
        return self._forward or self._backward

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Of the current micro-batch; of the batch, if memory ran out and it was split."""
        if self.micro_batch <= len(self._batch):
            return self._batch[self.micro_batch - 1].image_ids
        return image_ids_of(self._batch)

    def found(self, finding: DebugFinding) -> None:
        """Take a finding outside of the model, unless there was one before."""
        self._forward = self._forward or finding

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model's modules until the block ends."""
        with ExitStack() as undo:
            for name, module in self._model.named_modules():
                before = functools.partial(self._before, name)
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                undo.callback(handle.remove)
                undo.callback(module.register_forward_hook(self._after).remove)
                for method in _entry_methods(module):
                    setattr(module, method, self._wrapped(name, module, getattr(module, method)))
                    undo.callback(delattr, module, method)
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad:
                    hook = functools.partial(self._parameter_gradient, name)
                    handle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
                    undo.callback(handle.remove)
            yield

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
            self.micro_batch, self._in_backward = self.micro_batch + 1, False
            # Recomputation (activation checkpointing) ends in the middle of a module.
            self._running.clear()
            self._done.clear()
        named = {**{f"input {i}": value for i, value in enumerate(args)}, **options}
        inputs = {} if self._in_backward else summaries(named)
        call = _Call(name, module, self.micro_batch, inputs)
        self._running.append(call)
        tapped = map_tensors((args, options), functools.partial(_tap, self._gradient_leaves, call))
        return tapped[0], tapped[1]

    def _after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        call = self._running.pop()
        if not self._in_backward:
            call.outputs = summaries({"output": output})
            self._done[module].append(call)
            took_finite = all(summary.is_finite for summary in call.inputs.values())
            gave_finite = all(summary.is_finite for summary in call.outputs.values())
            if self._forward is None and took_finite and not gave_finite:
                ids = self._images_of(output)
                self._forward = call.finding("forward", call.inputs | call.outputs, ids)
        return map_tensors(output, functools.partial(_tap, self._gradient_enters, call))

    def _gradient_enters(self, call: _Call, gradient: Tensor) -> None:
        """Note the gradient of a module's output."""
        self._in_backward = True
        call.grad_outputs[f"grad of output {len(call.grad_outputs)}"] = summarise(gradient)
        if call.own is self._model and not call.got_finite_gradients and not self._backward:
            tensors = call.outputs | call.grad_outputs
            self._backward = DebugFinding(
                "backward", "the loss", "criterion", call.micro_batch, self.image_ids, tensors
            )

    def _gradient_leaves(self, call: _Call, gradient: Tensor) -> None:
        """Note the gradient of a module's input."""
        summary = summarise(gradient)
        if not summary.is_finite and call.got_finite_gradients:
            self._blame(call, {"grad of input": summary})

    def _parameter_gradient(self, name: str, gradient: Tensor) -> None:
        owner, _, own_name = name.rpartition(".")
        calls, summary = self._done[self._model.get_submodule(owner)], summarise(gradient)
        if calls and not summary.is_finite and all(call.got_finite_gradients for call in calls):
            self._blame(calls[-1], {f"grad of {own_name}": summary})

    def _blame(self, call: _Call, gradients: dict[str, TensorSummary]) -> None:
        if self._backward is None:
            tensors = call.inputs | call.outputs | call.grad_outputs | gradients
            self._backward = call.finding("backward", tensors, self.image_ids)

    def _images_of(self, output: Any) -> tuple[int, ...]:
        """The images whose rows are not finite, if rows are images; else all of them."""
        ids = self.image_ids
        for _, tensor in named_tensors(output):
            if tensor.is_floating_point() and tensor.ndim > 1 and len(tensor) == len(ids):
                bad = bad_rows(tensor, ids)
                if bad:
                    return bad
        return ids


def _tap(note: Callable[[_Call, Tensor], None], call: _Call, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, of which `note` gets the gradient."""
    if not (tensor.requires_grad and tensor.is_floating_point() and torch.is_grad_enabled()):
        return tensor
    tapped = tensor.clone()
    tapped.register_hook(functools.partial(note, call))  # type: ignore[no-untyped-call]
    return tapped


def _entry_methods(module: nn.Module) -> list[str]:
    """Names of the methods that replace a missing `forward`."""
    if type(module).forward is not nn.Module.forward:
        return []
    classes = [c for c in type(module).__mro__ if c.__module__.startswith("runkey.")]
    names = {
        name
        for c in classes
        for name, item in vars(c).items()
        if isinstance(item, types.FunctionType) and not name.startswith("_")
    }
    return sorted(names - set(dir(nn.Module)))
