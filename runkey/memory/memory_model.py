"""memory/memory.json: the model of memory, which training chooses its micro-batch by.

It follows from parameters and annotations alone: no measured number, the same bytes on any machine.
All bytes are those of CUDA's caching allocator; what lies outside of it (the context, other
processes) is added when a device is known, see `runkey.memory.choose`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.data.shapes import Shape
from runkey.errors import TrainingError
from runkey.memory.allocator import Allocator, Block
from runkey.memory.batch_shapes import Census
from runkey.memory.timeline import ROUND_BYTES, rounded
from runkey.memory.trace.tracker import Event, Pass, Trace

# Memory as a line over the images of a forward pass.


GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Line:
    """Peak bytes of a training step as a function of the images of a forward pass."""

    base_bytes: float
    """Weights, optimizer state, libraries: what no image adds to."""
    bytes_per_image: float

    def at(self, images: int) -> int:
        """Predicted peak, bytes."""
        return round(self.base_bytes + self.bytes_per_image * images)

    def __str__(self) -> str:
        return f"{self.base_bytes / MIB:.0f} MiB + {self.bytes_per_image / MIB:.1f} MiB an image"


def line_through(first: tuple[int, int], last: tuple[int, int]) -> Line:
    """The line through two peaks, each (images, bytes); it never falls."""
    first, last = sorted((first, last))
    slope = max(0.0, (last[1] - first[1]) / (last[0] - first[0]))
    # Through the larger peak: where noise has flattened the line, it stays above both.
    return Line(last[1] - slope * last[0], slope)


# How each block's bytes depend on images and padded shape: three traces stand for all batches.


_STRIDES = (1, 2, 4, 8, 16, 32)
# Attention kernels round the number of tokens up to these.
_PADS = (8, 16, 32)


def quantities(one: Pass, stride: int) -> NDArray[np.int64]:
    """What a block's bytes can be proportional to: constant first, then simple before composed.

    Args:
        one: the forward and backward pass.
        stride: pixels from token to token.
    """
    cells = _cells(one.height, one.width)
    tokens = cells[stride]
    padded = [-(-tokens // pad) * pad for pad in _PADS]
    rows, columns = -(-one.height // stride), -(-one.width // stride)
    plain = [1, one.height, one.width, rows, columns, *cells.values()]
    plain += [*padded, tokens * tokens, *(tokens * number for number in padded)]
    # The second half begins with the images alone.
    return np.array([*plain, *(one.batch * number for number in plain)], dtype=np.int64)


def _cells(height: int, width: int) -> dict[int, int]:
    """Cells of a feature map by stride: every halving rounds up, as convolutions' sizes do."""
    cells = {}
    for stride in _STRIDES:
        cells[stride] = height * width
        height, width = -(-height // 2), -(-width // 2)
    return cells


def other_shape(worst: Shape, stride: int) -> Shape:
    """A smaller shape that tells quantities apart, and that kernels treat like `worst`.

    Attention pads masks whose rows are no multiple of 8 or 16 tokens, by extra allocations, so both
    shapes must be multiples or neither.
    """
    height, width = worst
    wanted = _alignment(worst, stride)
    best, most = worst, 0
    for part in (0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
        for less in range(0, 2 * stride, 3):
            shape = (max(1, round(height * part) - less), max(1, round(width * part * 0.87) - less))
            if _alignment(shape, stride) == wanted:
                told_apart = _told_apart(worst, shape, stride)
                best, most = max((best, most), (shape, told_apart), key=lambda pair: pair[1])
    return best


def _alignment(shape: Shape, stride: int) -> list[bool]:
    tokens = _cells(*shape)[stride]
    return [tokens % pad == 0 for pad in (8, 16)]


def _told_apart(worst: Shape, shape: Shape, stride: int) -> int:
    """How many quantities grow differently from one shape to the other."""
    one, other = (quantities(Pass(1, *s, 0), stride).astype(float) for s in (worst, shape))
    return len(np.unique(one / other))


@dataclass(frozen=True, slots=True)
class Laws:
    """Bytes of every block of a trace, for a pass of any shape."""

    stride: int
    """Pixels from token to token."""
    index: NDArray[np.int64]
    """Which of `quantities` each block is proportional to."""
    share: NDArray[np.float64]
    """Bytes a unit of it."""
    constant: NDArray[np.float64]
    """Bytes on top."""
    loose: int
    """Blocks that follow no law exactly, and are bounded instead."""

    def bytes(self, one: Pass) -> NDArray[np.int64]:
        """Bytes of each block in such a pass."""
        values = self.constant + self.share * quantities(one, self.stride)[self.index]
        return np.rint(values).astype(np.int64)


def find_laws(sizes: NDArray[np.int64], passes: Sequence[Pass], stride: int) -> Laws:
    """The law of each block.

    Args:
        sizes: [traces, blocks] bytes.
        passes: what was traced, [traces]; the first two differ in the images alone.
        stride: pixels from token to token.
    """
    known = np.stack([quantities(one, stride) for one in passes]).astype(np.float64)
    index = np.zeros(sizes.shape[1], dtype=np.int64)
    share, constant = np.zeros(len(index)), np.zeros(len(index))
    unknown = np.ones(len(index), dtype=bool)
    for number, unit in enumerate(known.T):
        a_unit = sizes / unit[:, None]
        fits = unknown & (a_unit == a_unit[0]).all(0)
        index[fits], share[fits] = number, a_unit[0, fits]
        unknown &= ~fits
    loose = np.flatnonzero(unknown)
    # Affine in the images whatever the shape: too much for all shapes below the worst.
    images = np.array([[one.batch] for one in passes])
    rise = np.maximum(0, sizes[1, loose] - sizes[0, loose]) / (images[1] - images[0])
    index[loose], share[loose] = known.shape[1] // 2, rise
    constant[loose] = (sizes[:, loose] - rise * images).max(0)
    return Laws(stride, index, share, constant, len(loose))


# A traced training step as a template: the same events for any window, with the bytes to match.


_CONVOLUTIONS = ("backbone.", "input_proj")
"""Modules whose operations may take a workspace worth speaking of."""
_LEAST_WORKSPACE = MIB


Move = tuple[bool, int, int]
"""For an allocator: whether it is an allocation, number of the block, bytes."""


class Template:
    """A step over a window of two micro-batches, of which the second stands for all later ones.

    Blocks are numbered from 0: those that are alive at its start first.
    """

    def __init__(self, trace: Trace, laws: Laws) -> None:
        """Made by `make_template`."""
        self._trace = trace
        self._laws = laws
        self._numbers = _numbers(trace)
        self._before = [self._numbers[event.block] for event in trace.before]
        kinds = [(self._numbers[event.block], event.class_) for event in trace.before]
        self._late = [block for block, kind in kinds if kind == "optimizer"]
        # Gradients are there from the first step's backward pass on.
        self._early = [block for block, kind in kinds if kind not in ("optimizer", "gradient")]
        self._heirs = _heirs(trace, self._numbers)
        every = [self._compact(event) for event in trace.events]
        self._blocks = np.array([block for _, block, _ in every])
        self._signs = np.array([1 if is_allocation else -1 for is_allocation, _, _ in every])
        self._works = np.array([works for _, _, works in every])
        first, later, last = _ranges(trace)
        self._first, self._later, self._last = (every[part] for part in (first, later, last))

    @property
    def loose_blocks(self) -> int:
        """Blocks whose bytes are bounded, not known, away from the traced batches."""
        return self._laws.loose

    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        made = [e for e in self._trace.events if e.class_ == "gradient" and e.kind == "alloc"]
        return sum(rounded(event.bytes) for event in made)

    def peak(self, one: Pass, workspace_share: float = 0.0) -> int:
        """Most bytes alive in a step over two such micro-batches, a convolution's workspace too."""
        sizes = -(-self._laws.bytes(one) // ROUND_BYTES) * ROUND_BYTES
        alive = sizes[self._before].sum() + (sizes[self._blocks] * self._signs).cumsum()
        return int((alive + workspace_share * sizes[self._blocks] * self._works).max(initial=0))

    def at(self, one: Pass) -> Trace:
        """The trace of a window of two such micro-batches."""
        sizes = self._laws.bytes(one).tolist()

        def resized(event: Event) -> Event:
            return event._replace(bytes=sizes[self._numbers[event.block]])

        return Trace(
            passes=(one, one),
            before=tuple(map(resized, self._trace.before)),
            events=tuple(map(resized, self._trace.events)),
            marks=self._trace.marks,
        )

    def moves(self, windows: Sequence[Sequence[Pass]], workspace_share: float) -> Iterator[Move]:
        """What an allocator sees of training steps.

        Args:
            windows: the micro-batches of each step.
            workspace_share: bytes of a workspace that a convolution takes while it runs, as a part
                of its result.
        """
        sizes = {one: self._laws.bytes(one).tolist() for window in windows for one in window}
        new = itertools.count()
        constant = sizes[windows[0][0]]
        live = {block: (next(new), constant[block]) for block in self._early}
        yield from ((True, *block) for block in live.values())
        late = self._late
        for window in windows:
            parts = [(self._first, window[0]), *((self._later, one) for one in window[1:])]
            for events, one in [*parts, (self._last, window[0])]:
                bytes_of = sizes[one]
                if events is self._last:
                    # The first step makes the optimizer's state, among what it has left over.
                    made = {block: (next(new), constant[block]) for block in late}
                    yield from ((True, *block) for block in made.values())
                    live |= made
                    late = []
                for is_allocation, block, works in events:
                    # What a pass left behind is replaced when the pass comes again, and what a pass
                    # would have made that was left out cannot be freed.
                    old = live.pop(block, None)
                    if is_allocation:
                        live[block] = number, size = next(new), bytes_of[block]
                        yield True, number, size
                        workspace = round(workspace_share * size) if works else 0
                        if workspace >= _LEAST_WORKSPACE:
                            number = next(new)
                            yield True, number, workspace
                            yield False, number, workspace
                    if old is not None:
                        yield False, *old
            for heir, block in self._heirs:
                if heir in live:
                    old = live.pop(block, None)
                    live[block] = live.pop(heir)
                    if old is not None:
                        yield False, *old

    def _compact(self, event: Event) -> tuple[bool, int, bool]:
        is_allocation = event.kind == "alloc"
        works = is_allocation and event.module.startswith(_CONVOLUTIONS)
        return is_allocation, self._numbers[event.block], works


def make_template(traces: Sequence[Trace], stride: int) -> Template:
    """A template from traces of the same step over windows of two equal micro-batches.

    Args:
        traces: the first two differ in the images alone, the third in the shape too.
        stride: pixels from token to token.

    Raises:
        ValueError: the traces differ in more than bytes.
    """
    numbers = [_numbers(trace) for trace in traces]
    kinds = [_structure(t, n) for t, n in zip(traces, numbers, strict=True)]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("the traced steps allocate different blocks")
    sizes = np.array([_sizes(t, n) for t, n in zip(traces, numbers, strict=True)])
    return Template(traces[0], find_laws(sizes, [t.passes[0] for t in traces], stride))


def _numbers(trace: Trace) -> dict[int, int]:
    """Numbers from 0 for blocks: those alive at the start by what they are, others in order."""
    numbers: dict[int, int] = {}
    for event in (*_sorted(trace.before), *trace.events):
        if event.kind == "alloc":
            numbers[event.block] = len(numbers)
    return numbers


def _sorted(before: Sequence[Event]) -> list[Event]:
    """In an order that does not depend on the step before."""
    return sorted(before, key=lambda event: (event.class_, event.module, event.bytes))


def _structure(trace: Trace, numbers: dict[int, int]) -> list[tuple[object, ...]]:
    """Everything about the events but bytes."""
    events = (*_sorted(trace.before), *trace.events)
    every = [(e.kind, numbers[e.block], e.class_, e.module) for e in events]
    return [*every, *trace.marks]


def _sizes(trace: Trace, numbers: dict[int, int]) -> list[int]:
    """Bytes of each block."""
    sizes = [0] * len(numbers)
    for event in (*trace.before, *trace.events):
        sizes[numbers[event.block]] = event.bytes
    return sizes


def _ranges(trace: Trace) -> tuple[slice, slice, slice]:
    """Events of the first micro-batch, of the second, and of the update."""
    forwards = [mark.start for mark in trace.marks if mark.phase == "forward"]
    last = [mark.start for mark in trace.marks if mark.phase == "optimizer"][-1]
    return slice(0, forwards[1]), slice(forwards[1], last), slice(last, len(trace.events))


def _heirs(trace: Trace, numbers: dict[int, int]) -> list[tuple[int, int]]:
    """Pairs: a block alive at the step's end, and the one that stands there at its start.

    What is alive at the end is what was alive at the start, but for having been made anew.
    """
    start = {numbers[event.block]: event for event in trace.before}
    end = dict(start)
    for event in trace.events:
        if event.kind == "alloc":
            end[numbers[event.block]] = event
        else:
            del end[numbers[event.block]]
    waiting: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for block, event in start.items():
        if block not in end:
            waiting[event.class_, event.module, event.bytes].append(block)
    return [
        (block, waiting[event.class_, event.module, event.bytes].pop(0))
        for block, event in end.items()
        if block not in start
    ]


# Census batches replayed through the model of the allocator: how much it holds on to.


@dataclass(frozen=True, slots=True)
class Replay:
    """What census batches did to the model of the allocator."""

    images: int
    """Micro-batch."""
    batches: int
    """Forward passes."""
    allocated_bytes: int
    """Most that was alive at once, a convolution's workspace too."""
    reserved_bytes: int
    """Most that the allocator held."""

    @property
    def fragments_bytes(self) -> int:
        """What the allocator held beside what was alive."""
        return self.reserved_bytes - self.allocated_bytes


def replay(template: Template, windows: Sequence[Sequence[Pass]], workspace_share: float) -> Replay:
    """Replay training steps; the allocator has no limit, and expandable segments.

    Args:
        template: the step.
        windows: its micro-batches.
        workspace_share: see `Template.moves`.
    """
    allocator = Allocator(expandable=True)
    blocks: dict[int, Block] = {}
    for is_allocation, handle, size in template.moves(windows, workspace_share):
        if is_allocation:
            blocks[handle] = allocator.allocate(size)
        else:
            allocator.release(blocks.pop(handle))
    return Replay(
        images=max(one.batch for window in windows for one in window),
        batches=sum(len(window) for window in windows),
        allocated_bytes=allocator.max_allocated,
        reserved_bytes=allocator.max_reserved,
    )


MODEL = "memory.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a training step of the worst shape, for micro-batches of 1, 2, ... images."""

    line: Line
    """Bytes that tensors take at the peak, from two images on."""
    allocated_bytes: tuple[int, ...]
    """The same for each micro-batch; of one image, of the largest single image."""
    upper_bytes: tuple[int, ...]
    """What the allocator holds at most, fragments and kernels' workspaces included."""

    def upper(self, images: int) -> int:
        """`upper_bytes` of a micro-batch; beyond the batch size, as much more as images more."""
        known = len(self.upper_bytes)
        if images <= known:
            return self.upper_bytes[images - 1]
        before = self.upper_bytes[-2] if known > 1 else self.upper_bytes[0]
        rise = max(self.line.bytes_per_image, self.upper_bytes[-1] - before)
        return self.upper_bytes[-1] + round(rise * (images - known))


@dataclass(frozen=True, slots=True)
class Alternative:
    """The same training with one parameter changed."""

    name: str
    """See `runkey.memory.predict`."""
    change: str
    """As params.yaml writes it."""
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A trace that the model did not see, against what the model says of it."""

    images: int
    height: int
    width: int
    traced_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """All that is known of a training's memory before it has run."""

    batch_size: int
    """Images of an optimizer step."""
    precision: str
    """fp32, bf16 or fp16: what a current GPU would compute in."""
    census: Census
    gpu: Estimate
    cpu: Line
    """Bytes of tensors in the precision of a CPU, which for `auto` is fp32."""
    gradient_bytes: int
    """What data parallel training adds: buckets as large as all gradients."""
    confirmation: Confirmation
    replays: tuple[Replay, ...]
    loose_blocks: int
    """Blocks whose size follows no law and is bounded."""
    alternatives: tuple[Alternative, ...]

    def alternative(self, name: str) -> Alternative | None:
        """The one of that name, if it was looked at."""
        return next((one for one in self.alternatives if one.name == name), None)

    def limit_pixels(self, images: int) -> int:
        """Padded pixels of the largest batch that micro-batches of `images` are vouched for."""
        height, width = self.census.worst_of(images)
        return images * height * width


def write_model(folder: Path, model: MemoryModel) -> None:
    """Write memory.json into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT} | asdict(model), indent=1, allow_nan=False)
    # Lists of numbers on one line each: there is one number an image.
    text = re.sub(r"\[[\s\d,]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    (folder / MODEL).write_text(text + "\n", encoding="utf-8")


def read_model(path: Path, batch_size: int | None = None) -> MemoryModel:
    """Read memory/memory.json.

    Args:
        path: the file.
        batch_size: `training.batch_size`; the model must be for this one.  None: any.

    Raises:
        TrainingError: it is not there, not a model of memory, or for another batch size.
    """
    again = "run `dvc repro profile_memory`"
    try:
        model = _parsed(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TrainingError(f"{path}: not found; {again} first") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TrainingError(f"{path}: no memory model of this version; {again}") from None
    if batch_size is not None and batch_size != model.batch_size:
        raise TrainingError(
            f"{path}: made for training.batch_size {model.batch_size}, not {batch_size}; {again}"
        )
    return model


def _parsed(tree: Mapping[str, Any]) -> MemoryModel:
    fields = dict(tree)
    if fields.pop("format") != FORMAT:
        raise ValueError("another format")
    shapes = ("largest", "worst", "worst_ungrouped", "worst_grouped", "objects")
    census = fields["census"] | {name: tuple(fields["census"][name]) for name in shapes}
    return MemoryModel(
        **fields
        | {
            "census": Census(**census),
            "gpu": _estimate(fields["gpu"]),
            "cpu": Line(**fields["cpu"]),
            "confirmation": Confirmation(**fields["confirmation"]),
            "replays": tuple(Replay(**one) for one in fields["replays"]),
            "alternatives": tuple(
                Alternative(one["name"], one["change"], _estimate(one["estimate"]))
                for one in fields["alternatives"]
            ),
        }
    )


def _estimate(tree: Mapping[str, Any]) -> Estimate:
    return Estimate(
        Line(**tree["line"]), tuple(tree["allocated_bytes"]), tuple(tree["upper_bytes"])
    )
