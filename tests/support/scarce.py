"""A window that does not fit in memory: python -m tests.support.scarce

Computes a window's gradients with all the memory there is, then with so little that the allocator
refuses what 8 images need, and prints what came of it as JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runkey.data.dataset import GlobalBatch
from runkey.errors import TrainingError
from runkey.training.device import configure_torch, seed_step
from runkey.training.distributed import World
from runkey.training.step import TrainStep, accumulate_gradients
from tests.support.fitting import fit
from tests.support.logged import logged_lines
from tests.support.ranks import machinery
from tests.support.toy import (
    SIZE,
    MemoryTracker,
    SavedInMemory,
    StoppedError,
    ToyCriterion,
    ToyLoader,
    ToyModel,
    make_params,
    make_window,
)

MIB = 2**20
IDS = [1, 2, 3, 7, 5, 4, 6, 8]
reseed = partial(seed_step, 0, 7)


class InFloat64(ToyLoader):
    """The toy's images in windows of 8, with boxes in fp64."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        for window in super().epoch(epoch, start_step):
            yield tuple(replace(b, boxes_cxcywh=b.boxes_cxcywh.double()) for b in window)


class Hungry(nn.Module):
    """The toy, with a copy of its input that takes 12 MiB an image at a time.

    malloc is told (MALLOC_MMAP_THRESHOLD_) to give blocks of 1 MiB back when they are freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.toy = ToyModel(dropout=0.3)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, images: torch.Tensor, padding_mask: Any, targets: Any) -> Any:
        images = images.double()
        size = 12 * MIB // (8 * 3 * SIZE**2)
        many = (images[:, None].expand(-1, size, -1, -1, -1) * self.scale).square()
        return self.toy(many.mean(1).sqrt(), padding_mask, targets)


def attempt(parts: TrainStep, window: GlobalBatch, limit: int | None = None) -> dict[str, Any]:
    parts.optimizer.zero_grad()
    result = accumulate_gradients(parts, window, limit, reseed)
    named = dict(parts.model.named_parameters())
    return {
        "gradients": {name: p.grad.clone() for name, p in named.items() if p.grad is not None},
        "buffers": {name: b.clone() for name, b in parts.model.named_buffers()},
        "splits": [(s.images, s.height, s.width, s.limit) for s in result.splits],
    }


def fresh() -> TrainStep:
    torch.manual_seed(0)
    return machinery(Hungry().double().train(), ToyCriterion(), World())


def allow(mib: int) -> None:
    """Let the process grow by so much from here, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(tensor, other[kind][name])
        for kind in ("gradients", "buffers")
        for name, tensor in one[kind].items()
    )


def trained(memory_mib: int | None, limit: int | None, saved: SavedInMemory) -> Any:
    """A training of 2 steps, stopped by `saved` or not: the result, what was told, said."""
    tracker = MemoryTracker()
    configure_torch(0, deterministic=True)
    params = make_params(training={"epochs": 1})
    model = Hungry().double()
    if memory_mib is not None:
        allow(memory_mib)
    result = None
    with logged_lines() as lines, contextlib.suppress(StoppedError):
        result = fit(
            model,
            ToyCriterion(),  # type: ignore[arg-type]
            InFloat64(images=12),
            lambda _: {"val/loss": 0.0},
            params,
            tracker=tracker,
            checkpoints=saved,
            limit=limit,
        )
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    splits = [fields for kind, fields in tracker.events if kind == "split"]
    return result, model, splits, [line for line in lines if "memory ran out" in line]


def whole_training() -> dict[str, Any]:
    """Memory runs out in the first step: once found, the limit holds, through a resume as well."""
    reference, model, none, _ = trained(None, 2 * SIZE**2, SavedInMemory(due=False))
    saved = SavedInMemory(stop_after=2, due=False)
    _, _, splits, lines = trained(140, None, saved)
    step, limit = saved.content.step, saved.content.state["limit"]
    saved.stop_after = None
    _, again, more, _ = trained(140, None, saved)
    state, other = model.state_dict(), again.state_dict()
    return {
        "limit known": none == [],
        "splits": [[s["step"], s["images"], s["limit"]] for s in splits],
        "lines": lines,
        "stopped": [step, limit],
        "splits after the resume": more,
        "same weights": all(torch.equal(state[name], other[name]) for name in state),
        "steps": reference.step,
    }


def on_rank_1(world: World, mib: str) -> dict[str, Any]:
    """A window of two ranks; the memory of the second one is short by then."""
    for ids in (IDS[:2], IDS):  # the first loads what is loaded late
        if world.rank == 1 and ids is IDS:
            allow(int(mib))
        torch.manual_seed(0)
        parts = machinery(Hungry().double().train(), ToyCriterion(), world)
        window = make_window(ids[world.rank :: world.size], 8, dtype=torch.float64)
        found = attempt(parts, window)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    return found


def main() -> None:
    torch.set_num_threads(1)
    window = make_window(IDS, 8, dtype=torch.float64)
    attempt(fresh(), make_window(IDS[:1], 1, dtype=torch.float64))  # libraries are loaded by now
    limit = 2 * SIZE**2
    known = attempt(fresh(), window, limit)
    allow(140)
    split = attempt(fresh(), window)
    again = attempt(fresh(), window, split["splits"][-1][3])
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    allow(20)
    parts = fresh()
    buffers = {name: b.clone() for name, b in parts.model.named_buffers()}
    line = ""
    try:
        attempt(parts, window)
    except TrainingError as error:
        line = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    kept = all(torch.equal(b, buffers[name]) for name, b in parts.model.named_buffers())
    cleared = all(p.grad is None for p in parts.model.parameters())
    told = {
        "splits": split["splits"],
        "known": known["splits"],
        "same as with the limit known": same(known, split),
        "same again": same(again, split) and not again["splits"],
        "line": line,
        "kept": kept and cleared,
        "training": whole_training(),
    }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
