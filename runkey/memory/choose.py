"""Choose how many images go through the model at once on a device.

plan = plan_memory(params, root / MEMORY, device, trials=home / CALIBRATION)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from runkey.errors import StoppedError
from runkey.hashing import sha256_file
from runkey.memory.measure import (
    MemoryBudget,
    correction,
    cpu_line,
    memory_budget,
    read_line,
    read_trials,
    spare_bytes,
    this_platform,
)
from runkey.memory.predict import MODEL, Estimate, Line, MemoryModel, read_model
from runkey.memory.trace.gpu import Gpu
from runkey.params import Params
from runkey.units import GIB, counted

Bound = Callable[[int], int]
"""Images of a micro-batch to the most bytes that the step takes."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How an optimizer step is split."""

    micro_batch: int
    """Most images of a micro-batch."""
    accumulation: int
    """Micro-batches of a step."""
    chosen_by: str
    """The reason: `up to N fit`, `the checkpoint's` or `training.micro_batch`."""


@dataclass(frozen=True, slots=True)
class MemoryPlan(Choice):
    """How an optimizer step is split, and the memory that it takes."""

    limit_pixels: int
    """Padded pixels (images x height x width) of the largest batch that is predicted to fit."""
    needed_bytes: int
    """Upper bound of what the step takes."""
    budget_bytes: int
    """What the step may take."""

    def line(self) -> str:
        """Describe the plan in one line."""
        passes = f"{counted(self.accumulation, 'forward pass')} a step"
        return (
            f"micro-batch {self.micro_batch} ({self.chosen_by}), {passes}: "
            f"{self.needed_bytes / GIB:.2f} of {self.budget_bytes / GIB:.2f} GiB at most"
        )


def split_evenly(batch_size: int, micro_batch: int) -> tuple[int, int]:
    """Split a step into the fewest micro-batches, as even as can be: (micro-batch, count)."""
    count = -(-batch_size // min(micro_batch, batch_size))
    return -(-batch_size // count), count


def largest_fitting(bound: Bound, most: int, budget_bytes: int) -> int:
    """Return the most images, up to `most`, whose bound is within the budget; 0 if none is."""
    return max((n for n in range(1, most + 1) if bound(n) <= budget_bytes), default=0)


def choose(
    bound: Bound,
    budget: MemoryBudget,
    batch_size: int,
    *,
    micro_batch: int | None = None,
    saved: int | None = None,
    alternatives: Mapping[str, int] | None = None,
) -> Choice:
    """Choose the fewest micro-batches whose upper bound is within the budget.

    Args:
        bound: upper bound on the device.
        budget: what the step may take.
        batch_size: images of an optimizer step in this process.
        micro_batch: `training.micro_batch`, if it is a number; it is used in any case.
        saved: micro-batch of the checkpoint that training resumes from; kept if it fits.
        alternatives: changes of params.yaml, and the bytes that one image would take with each.

    Raises:
        StoppedError: not even one image fits; names what would make it fit.
    """
    if micro_batch is not None:
        return Choice(*split_evenly(batch_size, micro_batch), "training.micro_batch")
    fits = largest_fitting(bound, batch_size, budget.bytes)
    if not fits:
        raise StoppedError(_nothing_fits(bound(1), budget, alternatives or {}))
    if saved is not None and saved <= fits:
        return Choice(saved, -(-batch_size // saved), "the checkpoint's")
    return Choice(*split_evenly(batch_size, fits), f"up to {fits} fit")


def _nothing_fits(needed: int, budget: MemoryBudget, alternatives: Mapping[str, int]) -> str:
    """Say what one image takes, what the budget is, and which changes help."""
    sizes = sorted(alternatives.items(), key=lambda item: item[1])
    helpful = {f"{name} ({size / GIB:.2f} GiB)": size for name, size in sizes if size < needed}
    enough = [text for text, size in helpful.items() if size <= budget.bytes]
    way_out = "use a smaller model"
    if enough:
        way_out = "it would fit with " + ", or with ".join(enough)
    elif helpful:
        way_out = "no single change makes it fit: " + ", ".join(helpful)
    return (
        f"memory.budget_gib: a training step of one image takes up to {needed / GIB:.2f} GiB, "
        f"there are {budget.bytes / GIB:.2f} GiB ({budget.text}); {way_out}"
    )


def plan_memory(
    params: Params,
    folder: Path,
    device: torch.device,
    *,
    trials: Path,
    saved: int | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """Choose the micro-batch for a device, from memory.json and what was measured.

    Args:
        params: of the training.
        folder: profile_memory's output.
        device: where training runs.
        trials: file of this machine's trials; may be missing.
        saved: micro-batch of the checkpoint that training resumes from; kept if it fits.
        processes: number of processes that share each optimizer step.

    Raises:
        TrainingError: there is no memory.json for these parameters, or nothing fits (StoppedError).
    """
    training = params.training
    model, digest = read_model(folder / MODEL, training.batch_size), sha256_file(folder / MODEL)
    outside = 0
    # Gradients are copied into buckets while others are still computed: at most all of them.
    buckets = model.gradient_bytes if processes > 1 else 0
    if device.type == "cpu":
        # The line that was measured for this very memory.json, else the predicted one.
        line = read_line(folder, digest) or cpu_line(model.cpu)
        bound, alternatives = _on_cpu(model, line, buckets)
    else:
        gpu = Gpu(torch.cuda.get_device_capability(device))
        found = correction(read_trials(trials), this_platform(device), digest)
        outside = found.outside_bytes or gpu.context_bytes
        in_fp32 = training.precision == "auto" and not gpu.has_bf16
        bound, alternatives = _on_gpu(model, found.factor, buckets, in_fp32=in_fp32)
    budget = memory_budget(params.memory.budget_gib, device, outside)
    choice = choose(
        bound,
        budget,
        -(-training.batch_size // processes),
        micro_batch=None if training.micro_batch == "auto" else training.micro_batch,
        saved=saved,
        alternatives=alternatives,
    )
    return MemoryPlan(
        **asdict(choice),
        limit_pixels=model.limit_pixels(choice.micro_batch),
        needed_bytes=bound(choice.micro_batch),
        budget_bytes=budget.bytes,
    )


def _on_cpu(model: MemoryModel, line: Line, buckets: int) -> tuple[Bound, dict[str, int]]:
    """Return the bound, and the bytes of one image with each change, both plus `buckets`, bytes."""
    alternatives = {}
    for one in model.alternatives:
        if one.name not in ("bf16", "fp32"):
            part = one.estimate.line.bytes_per_image / model.gpu.line.bytes_per_image
            smaller = replace(line, bytes_per_image=line.bytes_per_image * part)
            alternatives[one.change] = smaller.at(1) + buckets
    return lambda images: line.at(images) + buckets, alternatives


def _on_gpu(
    model: MemoryModel, factor: float, buckets: int, *, in_fp32: bool
) -> tuple[Bound, dict[str, int]]:
    """Return the same from the upper bounds, times `factor` and plus `buckets`, bytes."""

    def bound_of(estimate: Estimate) -> Bound:
        return lambda images: round(estimate.upper(images) * factor) + buckets

    fp32 = [one.estimate for one in model.alternatives if one.name == "fp32"]
    estimate = fp32[0] if in_fp32 and fp32 else model.gpu
    return bound_of(estimate), {one.change: bound_of(one.estimate)(1) for one in model.alternatives}


CARDS_GIB = (8, 12, 16, 24, 40, 80)
_USUAL_GIB = 24
MOST_IMAGES = 999


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU of some size."""

    gib: float
    room_bytes: int
    """For the allocator: without the context, libraries and spare bytes."""
    images: int
    """Largest micro-batch, beyond the batch size too; 0: not even one image fits."""


def cards(estimate: Estimate) -> list[Card]:
    """Return what fits on common GPUs."""
    return [card_of(estimate, gib) for gib in CARDS_GIB]


def card_of(estimate: Estimate, gib: float) -> Card:
    """Return what fits on a GPU of `gib` GiB, whatever its generation."""
    total = round(gib * GIB)
    # Ampere's context: no generation is known to take more.
    budget = total - Gpu().context_bytes - spare_bytes(total)
    return Card(gib, budget, largest_fitting(estimate.upper, MOST_IMAGES, budget))


def shown_images(model: MemoryModel, budget_gib: float | None) -> int:
    """Return the micro-batch that tables and pictures show: the largest that fits the budget.

    `budget_gib` is `memory.budget_gib`; None, where that is "device": a 24 GiB GPU's.
    """
    fits = card_of(model.gpu, budget_gib or _USUAL_GIB).images
    return max(1, min(model.batch_size, fits))
