"""Which part of a training step time, kernels and arithmetic belong to; for `profile_step`.

Parts are found by hooks on a `TrainContext`, so training knows nothing of them. A node of the
backward pass belongs to the part that made it, which follows from its number.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType, _get_sequence_nr
from torch.autograd import Variable
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from runkey.model.criterion import Losses
from runkey.model.detr import Detector
from runkey.training.build import TrainContext

WAITING, PREPARING, COPYING = "waiting for data", "preparing images", "copying to the GPU"
FORWARD, BACKWARD = "forward", "backward"
MODEL = BACKBONE, ENCODER, DECODER, HEADS = "backbone", "encoder", "decoder", "heads"
"""The encoder with the projections before it, the decoder with its queries, keys and values."""
MATCHING, LOSS, CLIPPING = "matching", "loss", "clipping gradients"
OPTIMIZER, AVERAGE, LOGGING = "optimizer", "moving average", "logging and checks"
Key = tuple[str, str]
"""`forward`, `backward` or empty, and the part."""
_LABEL = "runkey: "
"""Before a part's name in the trace."""
_ENGINE = "autograd::engine::evaluate_function"
_SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds by part."""

    wall: dict[str, float]
    cpu: dict[str, float]
    """Of all threads of the process."""
    seconds: float
    """Wall time altogether."""


class PartClock:
    """Times of parts, which may lie inside each other, and their labels in a trace."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, str]] = []
        """Number of autograd's next node, and the part that makes it from there on."""
        self._parts, self._labels = [LOGGING], list[record_function | None]()
        self.restart()

    def restart(self) -> None:
        """Forget all times so far."""
        self._wall, self._cpu = defaultdict[str, float](float), defaultdict[str, float](float)
        self._last = (time.perf_counter(), time.process_time())
        self._began = self._last[0]

    def times(self) -> Times:
        """Return the times since then; those of a part do not include the parts inside it."""
        self._lap()
        return Times(dict(self._wall), dict(self._cpu), self._last[0] - self._began)

    def enter(self, part: str, *, labelled: bool = True) -> None:
        """Begin a part inside the present one."""
        self._lap()
        label = record_function(_LABEL + part) if labelled else None
        self._labels.append(label)
        self._parts.append(part)
        if label is not None:
            label.__enter__()  # type: ignore[no-untyped-call]
            self._mark()

    def leave(self) -> None:
        """End the innermost part."""
        self._lap()
        self._parts.pop()
        if (label := self._labels.pop()) is not None:
            label.__exit__(None, None, None)
            self._mark()

    def begin(self, part: str) -> None:
        """Begin what is outside of all others; what a failed forward pass has left open ends."""
        while self._labels:
            self.leave()
        self._lap()
        self._parts[0] = part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @property
    def now(self) -> str:
        """Return the innermost part."""
        return self._parts[-1]

    def maker_of(self, node: int) -> str:
        """Return the part that made one of autograd's nodes, by its number."""
        index = bisect_right(self._marks, node, key=lambda mark: mark[0]) - 1
        return self._marks[index][1] if index >= 0 else DECODER

    def _mark(self) -> None:
        self._marks.append((_get_sequence_nr(), self.now))

    def _lap(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self._wall[self.now] += wall - self._last[0]
        self._cpu[self.now] += cpu - self._last[1]
        self._last = (wall, cpu)


class _Labelled:
    """An object some of whose methods are parts of a step."""

    def __init__(self, target: Any, clock: PartClock, **parts: str) -> None:
        """Args: parts: method and part; the object's own call is the method `call`."""
        self._target, self._clock, self._parts = target, clock, parts

    def __call__(self, *inputs: Any) -> Any:
        with self._clock.part(self._parts["call"]):
            return self._target(*inputs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        return (
            _Labelled(found, self._clock, call=self._parts[name]) if name in self._parts else found
        )


class _LabelledLoss(_Labelled):
    """The criterion, and the backward pass that begins with its loss."""

    def __call__(self, *inputs: Any) -> Losses:
        losses: Losses = super().__call__(*inputs)
        losses.total.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]
        return losses

    def _begin_backward(self, _: Tensor) -> None:
        # Without a label or mark: on a GPU this runs in another thread, which counts its own nodes.
        self._clock.enter(BACKWARD, labelled=False)
        Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._clock.leave()
        self._clock.begin(PREPARING)  # of the next forward pass, if there is one


def label_parts(context: TrainContext, clock: PartClock) -> TrainContext:
    """Return a context whose parts are measured; its model and optimizer get hooks."""
    step = context.step
    model = cast(Detector, step.model)
    heads = (getattr(model, name, None) for name in ("class_embed", "bbox_embed", "proposal_head"))
    parts: list[tuple[str, nn.Module]] = [(DECODER, model), (BACKBONE, model.backbone[0])]
    for part, module in [*parts, *((HEADS, head) for head in heads if head is not None)]:
        module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part))
        module.register_forward_hook(lambda *_: clock.leave())
    vars(model)["encode"] = _Labelled(model.encode, clock, call=ENCODER)
    optimizer = step.optimizer

    def begin_update(*_: object) -> None:
        clock.begin(LOGGING)
        clock.enter(OPTIMIZER)

    optimizer.register_step_pre_hook(begin_update)
    optimizer.register_step_post_hook(lambda *_: clock.leave())
    matcher: Any = _Labelled(step.criterion.matcher, clock, call=MATCHING)
    criterion: Any = _LabelledLoss(replace(step.criterion, matcher=matcher), clock, call=LOSS)
    clipper: Any = _Labelled(step.clipper, clock, clip=CLIPPING)
    ema: Any = None if context.ema is None else _Labelled(context.ema, clock, update=AVERAGE)
    return replace(context, step=replace(step, criterion=criterion, clipper=clipper), ema=ema)


# Arithmetic and memory traffic.


class WorkCounter(TorchDispatchMode):
    """Counts the FLOPs and bytes of all operators in a block."""

    def __init__(self, clock: PartClock) -> None:
        super().__init__()
        self._clock, self._last = clock, DECODER
        self.flops, self.bytes = defaultdict[Key, int](int), defaultdict[Key, int](int)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        is_view = any(
            one.alias_info and not one.alias_info.is_write for one in func._schema.returns
        )
        if not is_view and not func._schema.name.startswith("aten::empty"):
            key = self._key()
            self.flops[key] += _flops(func._overloadpacket, args, kwargs or {}, out)
            self.bytes[key] += sum(map(_bytes, tree_leaves((args, kwargs, out))))
        return out

    def _key(self) -> Key:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return _key_of(self._clock.now)
        number = node._sequence_nr()
        self._last = self._clock.maker_of(number) if number < _NO_NUMBER else self._last
        return BACKWARD, self._last


_NO_NUMBER = 2**63
"""From here on: nodes that add to a parameter's gradient, which belong to the node before."""


def _key_of(part: str) -> Key:
    return (FORWARD if part in MODEL else "", part)


def _bytes(leaf: Any) -> int:
    if not isinstance(leaf, Tensor):
        return 0
    return min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    name = packet.__name__
    if name == "convolution_backward":  # torch's own formula does not know groups
        gradient, _, weight, *_, wanted = args
        return int(2 * gradient.numel() * weight[0].numel() * sum(wanted[:2]))
    if name.startswith("_scaled_dot_product"):  # torch's refuses values of another width
        back = name.endswith("backward")
        (batch, heads, queries, width), keys, values = (x.shape for x in args[back : back + 3])
        widths = 3 * width + 2 * values[-1] if back else width + values[-1]
        return int(2 * batch * heads * queries * keys[2] * widths)
    formula: Any = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


# What torch's profiler recorded.


@dataclass(slots=True)
class Events:
    """Sums over the profiled steps, seconds."""

    backward: dict[str, float]
    """Of each part's backward pass, on the host."""
    gpu: dict[Key, float]
    """Of the kernels that each part started."""
    busy_seconds: float = 0.0
    """In which at least one kernel ran."""
    syncs: int = 0
    """Times that the host waited for the GPU."""
    sync_seconds: float = 0.0

    def backward_shares(self) -> dict[str, float]:
        """Return each part's share of the backward pass."""
        total = sum(self.backward.values()) or 1.0
        return {part: seconds / total for part, seconds in self.backward.items()}


def read_events(events: Iterable[FunctionEvent], clock: PartClock) -> Events:
    """Sum up events by part: those of the backward pass by the node that they run."""
    found, makers = Events(defaultdict(float), defaultdict(float)), dict[int, str]()
    last, kernels = DECODER, list[tuple[float, float]]()
    for event in (ordered := sorted(events, key=lambda event: event.time_range.start)):
        begin, end = event.time_range.start / 1e6, event.time_range.end / 1e6
        if event.device_type != DeviceType.CPU:
            if not event.name.startswith(_LABEL):
                kernels.append((begin, end))
        elif event.name.startswith(_ENGINE):
            last = clock.maker_of(event.sequence_nr) if event.sequence_nr >= 0 else last
            makers[id(event)] = last
            found.backward[last] += end - begin
        elif event.name in _SYNCS:
            found.syncs += 1
            found.sync_seconds += end - begin
    for event in ordered:
        for kernel in event.kernels:
            if not kernel.name.startswith(_LABEL):
                key = ("", COPYING) if "HtoD" in kernel.name else _owner(event, makers)
                found.gpu[key] += kernel.duration / 1e6
    reached = 0.0
    for begin, end in kernels:
        found.busy_seconds += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return found


def _owner(event: FunctionEvent, makers: dict[int, str]) -> Key:
    """Return the part that an operator is in."""
    inside: FunctionEvent | None = event
    while inside is not None:
        if maker := makers.get(id(inside)):
            return BACKWARD, maker
        if inside.name.startswith(_LABEL):
            return _key_of(inside.name.removeprefix(_LABEL))
        inside = inside.cpu_parent
    return "", LOGGING
