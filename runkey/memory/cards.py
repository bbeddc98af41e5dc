"""The largest micro-batch on GPUs that people have."""

from __future__ import annotations

from dataclasses import dataclass

from runkey.memory.choose import largest_fitting, spare_bytes
from runkey.memory.generations import GENERATIONS
from runkey.memory.line import GIB
from runkey.memory.model import Estimate, MemoryModel

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
