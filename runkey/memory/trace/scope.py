"""Where a step is: its phase, and the module whose forward or backward pass allocates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from runkey.memory.trace.events import Phase
from runkey.model import backbone


class Scope:
    """The present phase and module path.

    Autograd numbers its nodes in the order of their making.  The numbers at which a module was
    entered and left tell later, in the backward pass, which module made a node.
    """

    def __init__(self) -> None:
        self.phase: Phase = "setup"
        self.path = ""
        self.node = 0
        """Backward: how many nodes have run."""
        self.recomputing = False
        """Backward: inside of a forward pass that is run again."""
        self.on_model: Callable[[], None] = lambda: None
        """Called when a model that is watched starts its forward pass."""
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._numbers: list[int] = [0]
        self._paths: list[str] = [""]

    def name(self, model: nn.Module) -> None:
        """Learn the paths of a model's modules."""
        self._names = {id(module): path for path, module in model.named_modules()}

    def enter(self, module: nn.Module) -> None:
        """A module's forward pass begins."""
        path = self._names.get(id(module), self.path)
        self._stack.append(self.path)
        if not path and self.phase != "backward":
            self.on_model()
        self.recomputing = self.phase == "backward"
        self._move(path)

    def leave(self) -> None:
        """It ends, by an exception or not."""
        if self._stack:
            self._move(self._stack.pop())

    def enter_node(self, number: int) -> None:
        """A node of the backward pass is about to run.

        Args:
            number: its sequence number; that of a parameter's gradient is no module's.
        """
        self.node += 1
        self.recomputing = False
        self._stack.clear()
        self.path = self._paths[bisect_right(self._numbers, number) - 1]

    def start(self, phase: Phase) -> None:
        """Another phase begins, outside of all modules."""
        self.phase, self.path, self.recomputing = phase, "", False
        self._stack.clear()
        self._move("")

    def forget_nodes(self) -> None:
        """A backward pass has ended: no node made before will run."""
        number = torch._C._autograd._get_sequence_nr()
        self._numbers, self._paths = [number], [self.path]

    def _move(self, path: str) -> None:
        self.path = path
        if self.phase == "forward":
            number = torch._C._autograd._get_sequence_nr()
            if number == self._numbers[-1]:
                self._paths[-1] = path
            else:
                self._numbers.append(number)
                self._paths.append(path)


@contextmanager
def watching(scope: Scope) -> Iterator[None]:
    """Tell `scope` of every module that is entered and left.

    A residual block and its convolutions are run by functions (`runkey.model.backbone`), not called
    as modules, so these functions are watched too.
    """

    def before(module: nn.Module, _: Any) -> None:
        scope.enter(module)

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        scope.leave()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *rest: Any) -> Any:
            scope.enter(module)
            try:
                return function(module, *rest)
            finally:
                scope.leave()

        return call

    hooks = (
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    )
    originals = {name: getattr(backbone, name) for name in ("residual_block", "conv_norm")}
    for name, function in originals.items():
        setattr(backbone, name, watched(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(backbone, name, function)
        for hook in hooks:
            hook.remove()
