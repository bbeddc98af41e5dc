"""Scenarios of tests/training/test_ranks_exchange.py, for tests.support.ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runkey import params
from runkey.errors import Interrupted, RunkeyError, StoppedError
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.training.device import seed_step
from runkey.training.distributed import Interrupts, World
from runkey.training.step import TrainStep, accumulate_gradients
from tests.support.ranks import WINDOWS, machinery, real
from tests.support.toy import make_window

IDS = [1, 2, 3, 7, 5, 4, 6, 8, 11, 12, 13, 14]
"""6 images for each of two ranks."""
FIRST, MIDDLE, LAST = "class_embed.weight", "layer1.0.conv2.weight", "conv1.weight"
"""Ends of parameters' names; their gradients are finished near the start of a backward pass, when
two of four buckets are sent, and at its end."""


@dataclass(frozen=True)
class RecordingWorld(World):
    """A world that notes when sums of gradients are started, and how large they are."""

    events: list[Any] = field(default_factory=list)

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        self.events.append(tensor.numel())
        return super().start_all_reduce(tensor)


def recording(world: World) -> RecordingWorld:
    names = ("rank", "local_rank", "size", "device_group", "monitor")
    return RecordingWorld(**{name: getattr(world, name) for name in names})


def live(world: World) -> TrainStep:
    """The real detector in fp64, with live batch norm and dropout."""
    parts = real("fast", world)
    parts.model.train()
    return parts


def named(parts: TrainStep, end: str) -> Tensor:
    return next(p for name, p in parts.model.named_parameters() if name.endswith(end))


def window_of(world: World, ids: list[int], micro_batch: int) -> Any:
    ours = ids[world.rank :: world.size]
    return make_window(ours, micro_batch, dtype=torch.float64, size=32)


def found(parts: TrainStep, losses: Any) -> dict[str, Any]:
    return {
        "gradients": {n: p.grad.clone() for n, p in parts.model.named_parameters()},
        "buffers": {n: b.clone() for n, b in parts.model.named_buffers()},
        "losses": losses.values,
        "splits": [(s.images, s.limit) for s in losses.splits],
    }


# Sums.


@contextmanager
def own_gradients(parts: TrainStep, last: int) -> Iterator[dict[str, Tensor]]:
    """Copies of this rank's own gradients in the last of its passes, before they are sent."""
    passes, copies = 0, {}

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def copy(name: str, parameter: Tensor) -> None:
        if passes == last:
            copies[name] = parameter.grad.clone()

    handles = [parts.model.register_forward_pre_hook(count)]
    handles += [
        p.register_post_accumulate_grad_hook(partial(copy, name))
        for name, p in parts.model.named_parameters()
    ]
    yield copies
    for handle in handles:
        handle.remove()


def summed_at_once(parts: TrainStep, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum over ranks of all gradients in one tensor, after the backward pass."""
    parameters = dict(parts.model.named_parameters())
    flat = torch.cat([mine.get(n, torch.zeros_like(p)).reshape(-1) for n, p in parameters.items()])
    dist.all_reduce(flat)
    sizes = [p.numel() for p in parameters.values()]
    return {
        name: part.view(p.shape)
        for (name, p), part in zip(parameters.items(), flat.split(sizes), strict=True)
    }


def dropping(world: World) -> TrainStep:
    """A detector that runs 1 of its 3 decoder layers in step 0."""
    section = params.Model(
        hidden_dim=16, num_heads=2, feedforward_dim=16, decoder_layers=3, num_queries=6
    )
    torch.manual_seed(0)
    parts = machinery(build_model(section, 3).train(), build_criterion(section, 3), world)
    parts = replace(parts, layer_drop=1.0)
    parts.reseed(next(seed for seed in range(99) if _depth(parts, seed) == 1), 0, world.rank)
    return parts


def _depth(parts: TrainStep, seed: int) -> int:
    parts.reseed(seed, 0, 0)
    return parts.model.transformer.decoder.depth  # type: ignore[union-attr]


def sums(world: World) -> dict[str, Any]:
    """Gradients that were sent in buckets, twice, and summed in one tensor; what was sent when."""
    cases = {f"{name}, {n}": (live, ids, n) for name, ids in WINDOWS.items() for n in (8, 1)}
    cases["layer drop"] = (dropping, WINDOWS["whole"], 2)
    results = {}
    for case, (build, ids, micro_batch) in cases.items():
        kept = recording(world)
        parts = build(kept)
        window = window_of(world, ids, micro_batch)
        if build is dropping:
            window = tuple(replace(b, boxes_cxcywh=b.boxes_cxcywh.float()) for b in window)
        again = []
        for _ in range(2):
            parts.optimizer.zero_grad()
            torch.manual_seed(0)
            with own_gradients(parts, len(window)) as mine:
                end = named(parts, LAST).register_post_accumulate_grad_hook(
                    lambda _, kept=kept: kept.events.append("backward ends")
                )
                accumulate_gradients(parts, window)
                end.remove()
            again.append({n: p.grad.clone() for n, p in parts.model.named_parameters()})
        results[case] = {
            "buckets": again,
            "at once": summed_at_once(parts, mine),
            "own": len(mine),
            "events": kept.events,
            "hooks left": sum(
                len(p._post_accumulate_grad_hooks or ()) for p in parts.model.parameters()
            ),
        }
    return results


# What happens in a backward pass.


def happens(parts: TrainStep, what: Callable[[], None], at: str, passes: tuple[int, ...]) -> None:
    """Call a function in some passes (from 1): in forward, or when a gradient is finished."""
    count = 0

    def forward(*_: Any) -> None:
        nonlocal count
        count += 1
        if at == "forward" and count in passes:
            what()

    def backward(_: Tensor) -> None:
        if count in passes:
            what()

    parts.model.register_forward_pre_hook(forward)
    if at != "forward":
        named(parts, at).register_post_accumulate_grad_hook(backward)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


PLACES = [(at, n) for n in (1, 2, 3) for at in ("forward", FIRST, MIDDLE, LAST)]


def scarce(world: World, *ranks: str) -> dict[Any, Any]:
    """Memory runs out on some ranks in one of three micro-batches of 2 images.

    Each with what the step would be if these ranks had known their limit.
    """
    mine = str(world.rank) in ranks
    reseed = partial(seed_step, 0, 7, world.rank)
    window = window_of(world, IDS, 2)

    def step(limit: int | None, at: str = "", *passes: int) -> dict[str, Any]:
        kept = recording(world)
        parts = live(kept)
        if mine and at:
            happens(parts, out_of_memory, at, passes)
        return found(parts, accumulate_gradients(parts, window, limit, reseed)) | {
            "sent": len(kept.events),
            "buckets": len(parts.exchange._buckets),
        }

    limit = 32 * 32 if mine else None
    results: dict[Any, Any] = {"known": step(limit)}
    return results | {(at, n): step(None, at, n) for at, n in PLACES}


def scarce_again(world: World) -> dict[str, Any]:
    """Memory runs out twice on rank 1, in the last backward pass each time."""
    window, reseed = window_of(world, IDS[:8], 4), partial(seed_step, 0, 7, world.rank)
    results = {}
    for known in (True, False):
        parts = live(world)
        if world.rank == 1 and not known:
            happens(parts, out_of_memory, MIDDLE, (1, 3))
        limit = 32 * 32 if world.rank == 1 and known else None
        results["known" if known else "found"] = found(
            parts, accumulate_gradients(parts, window, limit, reseed)
        )
    return results


def ends(world: World) -> dict[str, Any]:
    """What ends the step of rank 1 in a backward pass, and what is left on both ranks."""

    def stop() -> None:
        raise StoppedError("the disk is full")

    def interrupt() -> None:
        raise Interrupted(signal.SIGTERM)

    results: dict[str, Any] = {}
    for what in (stop, interrupt, out_of_memory):
        parts = live(world)
        before = {n: b.clone() for n, b in parts.model.named_buffers()}
        if world.rank == 1:
            happens(parts, what, MIDDLE, tuple(range(1, 9)))
        try:
            accumulate_gradients(parts, window_of(world, IDS[:4], 2))
        except (RunkeyError, Interrupted) as error:
            text = f"{type(error).__name__}: {error}"
        kept = all(torch.equal(b, before[n]) for n, b in parts.model.named_buffers())
        cleared = all(p.grad is None for p in parts.model.parameters())
        results[what.__name__] = (text, kept and cleared)
    results["signal"] = _signalled(world)
    results["changed"] = _changed(world)
    return results


def _signalled(world: World) -> Any:
    """A real signal in a backward pass of rank 1: the step is finished."""
    window, reseed = window_of(world, IDS, 2), partial(seed_step, 0, 7, world.rank)
    parts = live(world)
    undisturbed = found(parts, accumulate_gradients(parts, window, None, reseed))
    parts = live(world)
    if world.rank == 1:
        happens(parts, lambda: os.kill(os.getpid(), signal.SIGTERM), MIDDLE, (3,))
    stopped = False
    with Interrupts() as interrupts:
        try:
            with interrupts.held():
                disturbed = found(parts, accumulate_gradients(parts, window, None, reseed))
        except Interrupted:
            stopped = True
    return undisturbed, disturbed, stopped


def _changed(world: World) -> str:
    """Two backward passes where one is sent."""
    parts = live(world)
    model: nn.Module = parts.model
    text = ""
    with parts.exchange.overlap():
        try:
            for _ in range(2):
                sum(p.square().sum() for p in model.parameters()).backward()
        except RuntimeError as error:
            text = str(error)
    parts.exchange.finish()
    return text
