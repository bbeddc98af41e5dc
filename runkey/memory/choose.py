"""The line through two measured peaks, and the largest micro-batch under it that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runkey.errors import TrainingError
from runkey.memory.probe import Peak

GIB = 2**30
MIB = 2**20
_SPARE_BYTES = 256 * MIB
_SPARE_PART = 0.03


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


@dataclass(frozen=True, slots=True)
class Choice:
    """How an optimizer step is cut."""

    micro_batch: int
    """Images of a forward pass, at most."""
    accumulation: int
    """Forward passes of a step."""


def fit_line(peaks: Sequence[Peak]) -> Line:
    """The line through the peaks of the fewest and the most images; it never falls."""
    first, last = min(peaks, key=lambda p: p.images), max(peaks, key=lambda p: p.images)
    slope = max(0.0, (last.bytes - first.bytes) / (last.images - first.images))
    # Through the larger peak: where noise has flattened the line, it stays above both.
    return Line(last.bytes - slope * last.images, slope)


def spare_bytes(budget_bytes: int) -> int:
    """What is left free, for fragments, kernels' workspaces and the tracker beside the step."""
    return max(_SPARE_BYTES, round(_SPARE_PART * budget_bytes))


def cut(batch_size: int, micro_batch: int) -> Choice:
    """`batch_size` images in as few passes as `micro_batch` allows, of sizes as even as can be."""
    passes = -(-batch_size // min(micro_batch, batch_size))
    return Choice(-(-batch_size // passes), passes)


def choose(line: Line, batch_size: int, budget_bytes: int) -> Choice:
    """The fewest forward passes whose peak, with something to spare, is within the budget.

    Args:
        line: the model of memory.
        batch_size: images of an optimizer step.
        budget_bytes: for the whole process.

    Raises:
        TrainingError: not even one image fits.
    """
    limit = budget_bytes - spare_bytes(budget_bytes)
    fitting = [images for images in range(1, batch_size + 1) if line.at(images) <= limit]
    if not fitting:
        raise TrainingError(
            f"memory.budget_gib: a training step of one image takes {line.at(1) / GIB:.2f} GiB and "
            f"{spare_bytes(budget_bytes) / GIB:.2f} GiB to spare, the budget is "
            f"{budget_bytes / GIB:.2f} GiB; raise it, lower data.short_sides and data.long_side, "
            "or set model.checkpointing: true"
        )
    return cut(batch_size, max(fitting))
