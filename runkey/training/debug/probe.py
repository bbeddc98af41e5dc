"""Looks at everything that goes into and comes out of every module, forward and backward.

A module is watched where it is called.  One without a `forward` of its own is entered through its
methods, so these are watched in its place.  Between modules there is arithmetic too: if that goes
wrong, the module that does it is the innermost whose inputs were finite and whose outputs are not.

Gradients are read by identities that are put on what goes in and what comes out.  Torch's own
backward hooks take neither dataclasses nor in-place operations behind them.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runkey.data.dataset import GlobalBatch
from runkey.training.guard import json_safe
from runkey.training.step import image_ids_of

# Where the numbers of a step stop being finite.


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
class Finding:
    """The first place at which something that is not finite came out of finite numbers."""

    where: Where
    module: str = ""
    """Its name in the model; of the loss, its parts; of the weights, the tensor."""
    kind: str = ""
    """Its class."""
    micro_batch: int | None = None
    """Which of the window's, from 1; None: all the same."""
    image_ids: tuple[int, ...] = ()
    """COCO ids of that micro-batch, or of the images in it that are concerned."""
    tensors: dict[str, TensorNumbers] = field(default_factory=dict)
    """What went in, what came out, the module's own."""

    def lines(self) -> list[str]:
        """In words: the place first, then the numbers."""
        head = _HEADLINES[self.where].format(module=self.module or "the model", kind=self.kind)
        lines = [head]
        if self.micro_batch is not None:
            ids = ", ".join(map(str, self.image_ids))
            lines.append(f"  micro-batch {self.micro_batch}, images {ids}")
        width = max(map(len, self.tensors), default=0)
        return lines + [f"  {name:<{width}}  {numbers}" for name, numbers in self.tensors.items()]

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        plain: dict[str, Any] = json_safe(asdict(self))
        return plain


# Tensors in numbers, and tensors inside of what modules take and return.


@dataclass(frozen=True, slots=True)
class TensorNumbers:
    """What a tensor holds.  Least, greatest and so on are of its finite elements."""

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


@torch.no_grad()
def numbers_of(tensor: Tensor) -> TensorNumbers:
    """Read a floating tensor; waits for its device."""
    finite = tensor.isfinite()
    values = tensor[finite].double()
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    least = greatest = mean = absolute = float("nan")
    if values.numel():
        least, greatest = float(values.min()), float(values.max())
        mean, absolute = float(values.mean()), max(abs(least), abs(greatest))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorNumbers(tuple(tensor.shape), dtype, nan, inf, least, greatest, mean, absolute)


def floating(value: Any) -> list[tuple[str, Tensor]]:
    """The floating tensors in nested tuples, dicts and dataclasses, with their places in it."""
    return [(place, tensor) for place, tensor in _walk("", value) if tensor.is_floating_point()]


def _walk(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
        return
    for name, item in _items(value):
        yield from _walk(f"{place}.{name}" if place else name, item)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))


def replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with its tensors changed; itself where nothing is."""
    if isinstance(value, Tensor):
        return change(value)
    new = {name: replaced(item, change) for name, item in _items(value)}
    if all(new[name] is item for name, item in _items(value)):
        return value
    if isinstance(value, Mapping):
        return {key: new[str(key)] for key in value}
    if isinstance(value, list | tuple):
        # A named tuple takes its items one by one.
        return (
            type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
        )
    return dataclasses.replace(value, **new)


@dataclass
class _Call:
    """One call of a module, or of a method of it."""

    module: str
    kind: str
    own: nn.Module
    micro_batch: int
    inputs: dict[str, TensorNumbers]
    outputs: dict[str, TensorNumbers] = field(default_factory=dict)
    grad_outputs: dict[str, TensorNumbers] = field(default_factory=dict)

    @property
    def took_finite(self) -> bool:
        return all(numbers.is_finite for numbers in self.inputs.values())

    @property
    def got_finite_gradients(self) -> bool:
        return all(numbers.is_finite for numbers in self.grad_outputs.values())


class Probe:
    """What is found in a step; see the module's text."""

    def __init__(self, model: nn.Module, window: GlobalBatch) -> None:
        """Watch nothing yet; `watching` does."""
        self._model, self._window = model, window
        self._running: list[_Call] = []
        self._done: dict[nn.Module, list[_Call]] = defaultdict(list)
        self._forward: Finding | None = None
        self._backward: Finding | None = None
        self._in_backward = False
        self._micro_batch = 0

    @property
    def finding(self) -> Finding | None:
        """The first place; what the forward pass gave explains the backward pass."""
        return self._forward or self._backward

    @property
    def micro_batch(self) -> int:
        """The running one, from 1."""
        return self._micro_batch

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Of the running micro-batch; of the window, if memory ran out and it was cut anew."""
        if self._micro_batch <= len(self._window):
            return self._window[self._micro_batch - 1].image_ids
        return image_ids_of(self._window)

    def found(self, finding: Finding) -> None:
        """Take what was found outside of the model, unless there was something before."""
        if self._forward is None:
            self._forward = finding

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model's modules until the block ends."""
        undo: list[Callable[[], None]] = []
        for name, module in self._model.named_modules():
            before = functools.partial(self._before, name)
            undo += [
                module.register_forward_pre_hook(before, with_kwargs=True).remove,
                module.register_forward_hook(self._after).remove,
            ]
            for method in _entries(module):
                setattr(module, method, self._wrapped(name, module, getattr(module, method)))
                undo.append(functools.partial(delattr, module, method))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                hook = functools.partial(self._parameter_gradient, name)
                undo.append(parameter.register_hook(hook).remove)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for step in undo:
                step()

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
        kind = type(module).__name__
        inputs = _numbers(named) if not self._in_backward else {}
        call = _Call(name, kind, module, self._micro_batch, inputs)
        self._running.append(call)
        tapped = replaced((args, options), functools.partial(self._tap, self._leaves, call))
        return tapped[0], tapped[1]

    def _after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        call = self._running.pop()
        if not self._in_backward:
            call.outputs = _numbers({"output": output})
            self._done[module].append(call)
            is_finite = all(numbers.is_finite for numbers in call.outputs.values())
            if self._forward is None and call.took_finite and not is_finite:
                tensors = call.inputs | call.outputs
                self._forward = self._of(call, "forward", tensors, self._bad_images(output))
        return replaced(output, functools.partial(self._tap, self._enters, call))

    def _tap(self, note: Callable[[_Call, Tensor], None], call: _Call, tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and tensor.is_floating_point()):
            return tensor
        tapped: Tensor = _Tap.apply(tensor, functools.partial(note, call))  # type: ignore[no-untyped-call]
        return tapped

    def _enters(self, call: _Call, gradient: Tensor) -> None:
        """A gradient comes to a module from behind."""
        self._in_backward = True
        call.grad_outputs[f"grad of output {len(call.grad_outputs)}"] = numbers_of(gradient)
        if call.own is self._model and not call.got_finite_gradients:
            self._found_backward(
                Finding(
                    "backward",
                    "the loss",
                    "criterion",
                    call.micro_batch,
                    self.image_ids,
                    call.outputs | call.grad_outputs,
                )
            )

    def _leaves(self, call: _Call, gradient: Tensor) -> None:
        """A gradient goes on to what was before a module."""
        numbers = numbers_of(gradient)
        if not numbers.is_finite and call.got_finite_gradients:
            self._blame(call, {"grad of input": numbers})

    def _parameter_gradient(self, name: str, gradient: Tensor) -> None:
        owner, _, own_name = name.rpartition(".")
        module = self._model.get_submodule(owner)
        calls, numbers = self._done[module], numbers_of(gradient)
        if calls and not numbers.is_finite and all(call.got_finite_gradients for call in calls):
            self._blame(calls[-1], {f"grad of {own_name}": numbers})

    def _blame(self, call: _Call, gradients: dict[str, TensorNumbers]) -> None:
        tensors = call.inputs | call.outputs | call.grad_outputs | gradients
        self._found_backward(self._of(call, "backward", tensors, self.image_ids))

    def _found_backward(self, finding: Finding) -> None:
        if self._backward is None:
            self._backward = finding

    def _of(
        self, call: _Call, where: Any, tensors: dict[str, TensorNumbers], ids: tuple[int, ...]
    ) -> Finding:
        own = {
            name: numbers_of(tensor)
            for name, tensor in _own_tensors(call.own)
            if tensor.is_floating_point()
        }
        return Finding(where, call.module, call.kind, call.micro_batch, ids, tensors | own)

    def _bad_images(self, output: Any) -> tuple[int, ...]:
        """The images whose rows are not finite, if rows are images; else all of them."""
        ids = self.image_ids
        for _, tensor in floating(output):
            if tensor.ndim > 1 and len(tensor) == len(ids):
                good = tensor.detach().isfinite().flatten(1).all(1).tolist()
                bad = tuple(i for i, fine in zip(ids, good, strict=True) if not fine)
                if bad:
                    return bad
        return ids


class _Tap(torch.autograd.Function):
    """The identity, which shows the gradient that comes through it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        # A copy: an operation in place may follow, and views forbid that.
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.note(gradients[0])
        return gradients[0], None


def _numbers(named: dict[str, Any]) -> dict[str, TensorNumbers]:
    return {place: numbers_of(tensor) for place, tensor in floating(named)}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _entries(module: nn.Module) -> list[str]:
    """Names of the methods that stand for a missing `forward`."""
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
