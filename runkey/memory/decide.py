"""Training's question: how many images go through at once on this device?

    plan = decide(params, root / MEMORY, device, trials=home / CALIBRATION)

Reads memory.json, what was measured for it if anything was, and the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from runkey.hashing import sha256_file
from runkey.memory.choose import (
    Bound,
    MemoryPlan,
    Room,
    WayOut,
    Wish,
    choose,
    largest_fitting,
    room_on,
    spare_bytes,
)
from runkey.memory.measured import correction, read_line, read_trials, this_platform
from runkey.memory.memory_model import GIB, MODEL, Estimate, MemoryModel, read_model
from runkey.memory.predict import GENERATIONS, generation_of
from runkey.memory.trial import cpu_line
from runkey.params import Params

# The largest micro-batch on GPUs that people have.


CARDS_GIB = (8, 12, 16, 24, 40, 80)
_USUAL_GIB = 24
MOST_IMAGES = 999


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU of some size."""

    gib: float
    room_bytes: int
    """For the allocator: less the context, libraries and what is spared."""
    images: int
    """Largest micro-batch, beyond the batch size too; 0: not even one image fits."""


def cards(estimate: Estimate) -> list[Card]:
    """What fits on common GPUs."""
    return [card_of(estimate, gib) for gib in CARDS_GIB]


def card_of(estimate: Estimate, gib: float) -> Card:
    """What fits on a GPU of `gib` GiB."""
    room = room_bytes(round(gib * GIB))
    return Card(gib, room, largest_fitting(estimate.upper, MOST_IMAGES, room))


def room_bytes(budget: int) -> int:
    """What is left of a GPU's memory for the allocator, whatever the GPU's generation."""
    outside = max(one.context_bytes[1] for one in GENERATIONS)
    return budget - outside - spare_bytes(budget)


def shown_images(model: MemoryModel, budget_gib: float | None) -> int:
    """The micro-batch that tables and pictures are of: the largest that fits the budget.

    Args:
        model: the prediction.
        budget_gib: `memory.budget_gib`; None, where it is `device`: a usual GPU's.
    """
    fits = card_of(model.gpu, budget_gib or _USUAL_GIB).images
    return max(1, min(model.batch_size, fits))


_GPU_ONLY = ("bf16", "fp32")


def decide(
    params: Params,
    folder: Path,
    device: torch.device,
    *,
    trials: Path,
    kept: int | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """Choose the micro-batch for a device.

    Args:
        params: training and memory are read.
        folder: profile_memory's output.
        device: where training runs.
        trials: what was measured on this machine; need not be there.
        kept: micro-batch of the checkpoint that training goes on from; kept if it fits.
        processes: that share each optimizer step.

    Raises:
        TrainingError: there is no memory.json for these parameters, or nothing fits.
    """
    training = params.training
    model = read_model(folder / MODEL, training.batch_size)
    asked = None if training.micro_batch == "auto" else training.micro_batch
    wish = Wish(-(-training.batch_size // processes), asked, kept)
    if device.type == "cpu":
        bound, room, ways_out = _on_cpu(params, model, folder, device)
    else:
        bound, room, ways_out = _on_gpu(params, model, folder, device, trials, processes)
    choice = choose(bound, room, wish, ways_out)
    return MemoryPlan(
        micro_batch=choice.micro_batch,
        accumulation=choice.accumulation,
        chosen_by=choice.reason,
        limit_pixels=model.limit_pixels(choice.micro_batch),
        needed_bytes=bound(choice.micro_batch),
        room_bytes=room.bytes,
    )


def _on_cpu(
    params: Params, model: MemoryModel, folder: Path, device: torch.device
) -> tuple[Bound, Room, list[WayOut]]:
    """By the line that was measured for this very memory.json, else by the predicted one."""
    line = read_line(folder, sha256_file(folder / MODEL)) or cpu_line(model.cpu)
    ways_out = []
    for one in model.alternatives:
        if one.name not in _GPU_ONLY:
            part = one.estimate.line.bytes_per_image / model.gpu.line.bytes_per_image
            smaller = replace(line, bytes_per_image=line.bytes_per_image * part)
            ways_out.append(WayOut(one.change, smaller.at(1)))
    return line.at, room_on(params.memory.budget_gib, device, 0), ways_out


def _on_gpu(
    params: Params,
    model: MemoryModel,
    folder: Path,
    device: torch.device,
    trials: Path,
    processes: int,
) -> tuple[Bound, Room, list[WayOut]]:
    generation = generation_of(torch.cuda.get_device_capability(device))
    found = correction(read_trials(trials), this_platform(device), sha256_file(folder / MODEL))
    buckets = model.gradient_bytes if processes > 1 else 0

    def bound_of(estimate: Estimate) -> Bound:
        return lambda images: round(estimate.upper(images) * found.factor) + buckets

    fp32 = model.alternative("fp32")
    lacks_bf16 = params.training.precision == "auto" and not generation.has_bf16
    estimate = fp32.estimate if lacks_bf16 and fp32 else model.gpu
    outside = found.outside_bytes or generation.context_bytes[1]
    ways_out = [WayOut(one.change, bound_of(one.estimate)(1)) for one in model.alternatives]
    return bound_of(estimate), room_on(params.memory.budget_gib, device, outside), ways_out
