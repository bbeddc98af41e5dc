"""Looks at everything that goes into and comes out of every module, forward and backward.

A module is watched where it is called.  One without a `forward` of its own is entered through its
methods, so these are watched in its place.  Between modules there is arithmetic too: if that goes
wrong, the module that does it is the innermost whose inputs were finite and whose outputs are not.

Gradients are read by identities that are put on what goes in and what comes out.  Torch's own
backward hooks take neither dataclasses nor in-place operations behind them.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from runkey.data.batch import Window
from runkey.training.debug.finding import Finding
from runkey.training.debug.tensors import TensorNumbers, floating, numbers_of, replaced
from runkey.training.step import image_ids_of


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

    def __init__(self, model: nn.Module, window: Window) -> None:
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
