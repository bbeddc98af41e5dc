"""Trainings small enough to run for real, and the ways to trace a step of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory_replay import Peaks, replay_training
from runkey.data.dataset import colour_constants
from runkey.memory.trace.events import Event, MicroBatch, Trace
from runkey.memory.trace.record import BatchFields, BuiltStep, Recorder
from runkey.memory.trace.torch_private import fake_tensors, replaced_backward
from runkey.params import Params, load_params
from runkey.pipeline.step_factory import build_step, step_factory

PRESETS = Path(__file__).parents[2] / "presets"
CLASSES = 8
FIELDS = BatchFields(CLASSES, 2)


@dataclass(frozen=True)
class Training:
    """Parameters and a global batch."""

    preset: str
    changes: dict[str, Any]
    micro_batches: tuple[MicroBatch, ...]

    @property
    def params(self) -> Params:
        tree = load_params(PRESETS / f"{self.preset}.yaml").model_dump()
        for name, value in self.changes.items():
            section, _, key = name.partition(".")
            tree[section] = tree[section] | {key: value}
        return Params.model_validate(tree)


def _training(preset: str, *sizes: tuple[int, int, int, int], **changes: Any) -> Training:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return Training(preset, named, tuple(MicroBatch(*one) for one in sizes))


NOISE = {"groups": 2, "label_noise": 0.2, "box_noise": 0.4}
OFF, BF16, FP16 = (
    {"training__precision": precision, "training__cpu_threads": 1}
    for precision in ("off", "bf16", "fp16")
)
SMALL = {"model__encoder_layers": 2, "model__decoder_layers": 2}
TRAININGS = {
    "fast": _training("sample", (2, 120, 160, 3), **OFF),
    "fast, two passes, checkpoints": _training(
        "sample", (3, 96, 130, 5), (2, 96, 130, 5), **OFF, model__checkpointing=True
    ),
    "detr, dropout, no average": _training(
        "sample",
        (2, 96, 130, 5),
        **OFF,
        model__preset="detr",
        model__dropout=0.1,
        training__ema_decay=0.0,
    ),
    "denoising, contiguous": _training(
        "sample",
        (2, 96, 130, 5),
        **OFF,
        training__channels_last=False,
        model__denoising=NOISE,
    ),
    "one image, clipped by value": _training(
        "sample", (1, 96, 130, 1), **OFF, optimizer__clip={"mode": "value", "threshold": 1.0}
    ),
    "bf16, checkpoints, frozen norms": _training(
        "sample",
        (3, 96, 130, 5),
        (3, 96, 130, 5),
        **BF16,
        model__norm="frozen",
        model__checkpointing=True,
    ),
    "fp16, denoising": _training(
        "sample", (2, 96, 130, 5), **FP16, model__norm="frozen", model__denoising=NOISE
    ),
    "resnet18, frozen stem": _training(
        "sample", (2, 96, 130, 5), **OFF, model__backbone="resnet18", model__frozen_stages=1
    ),
    "resnet18, detr, backbone frozen": _training(
        "sample",
        (2, 96, 130, 5),
        **OFF,
        model__backbone="resnet18",
        model__preset="detr",
        optimizer__backbone_lr_factor=0.0,
    ),
    "resnet50": _training("coco-detr-r50", (1, 96, 130, 5), **OFF, **SMALL),
    "resnet50, checkpoints": _training(
        "coco-detr-r50", (2, 96, 130, 5), **OFF, **SMALL, model__checkpointing=True
    ),
    "resnet50, bf16, fast": _training(
        "coco-detr-r50", (1, 96, 130, 5), **BF16, **SMALL, model__preset="fast"
    ),
}


@dataclass(frozen=True)
class Traced:
    """Two steps, traced one way."""

    setup: tuple[Event, ...]
    steps: list[Trace]
    gradients: list[Tensor]

    @property
    def result(self) -> Peaks:
        first, steady = self.steps
        return replay_training(self.setup, first, [steady, steady])


def trace(training: Training, *, fake: bool, own: bool) -> Traced:
    """Trace a training on the CPU.

    Args:
        training: which.
        fake: on fake tensors.
        own: with our backward pass, not torch's.
    """
    # Kept by the process; a step that finds it there allocates less.
    colour_constants.cache_clear()
    torch.manual_seed(0)
    with ExitStack() as stack:
        if fake:
            stack.enter_context(fake_tensors())
        factory = step_factory(training.params, CLASSES)
        one = Recorder(factory, torch.device("cpu"), FIELDS)
        stack.enter_context(replaced_backward(one.backward) if own else torch_backward(one))
        traces = [one.step(training.micro_batches) for _ in range(2)]
        parameters = one.built.model.parameters()
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    return Traced(one.setup, traces, gradients)


@contextmanager
def torch_backward(one: Recorder) -> Iterator[None]:
    """Torch's own engine, which tells the recorder when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        original = torch.autograd.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            one.backward_started()
            original(*args, **kwargs)
            one.backward_ended()

        patch.setattr(torch.autograd, "backward", backward)
        yield


def in_order(events: Sequence[tuple[bool, int, int]]) -> list[object]:
    """Events (is an allocation, block, bytes) without what may differ by chance.

    Blocks are numbered in the order of allocation, and frees between two allocations are sorted:
    whether one tensor goes before another when both go at once changes nothing.
    """
    numbers: dict[int, int] = {}
    result: list[object] = []
    frees: list[tuple[int, int]] = []
    for is_allocation, block, size in events:
        if is_allocation:
            numbers[block] = len(numbers)
            result += [sorted(frees), size]
            frees = []
        else:
            frees.append((numbers.get(block, -1), size))
    return [*result, sorted(frees)]


@pytest.fixture(params=TRAININGS)
def training(request: pytest.FixtureRequest) -> Training:
    return TRAININGS[request.param]


@pytest.fixture(name="trace")
def trace_fixture() -> Callable[..., Traced]:
    return trace


@pytest.fixture(name="in_order")
def in_order_fixture() -> Callable[..., list[object]]:
    return in_order


@pytest.fixture
def build() -> Callable[[Training], tuple[BuiltStep, BatchFields]]:
    """A training's step on the CPU, on real tensors."""

    def built(training: Training) -> tuple[BuiltStep, BatchFields]:
        torch.manual_seed(0)
        cpu = torch.device("cpu")
        return build_step(training.params, CLASSES, cpu), FIELDS

    return built
