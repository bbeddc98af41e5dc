"""What training goes by: how an optimizer step is cut into forward passes on this device."""

from __future__ import annotations

from dataclasses import dataclass

from runkey.memory.line import GIB


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How an optimizer step is cut."""

    micro_batch: int
    """Images of a forward pass, at most."""
    accumulation: int
    """Forward passes of a step."""
    chosen_by: str
    """Why this one: `up to N fit`, `the checkpoint's` or `training.micro_batch`."""
    limit_pixels: int
    """Padded pixels (images x height x width) of the largest batch that is vouched for."""
    needed_bytes: int
    """Upper bound of what the step takes."""
    room_bytes: int
    """What there is for it, with something to spare."""

    def line(self) -> str:
        """The plan in words."""
        passes = f"{self.accumulation} forward pass{'' if self.accumulation == 1 else 'es'} a step"
        return (
            f"micro-batch {self.micro_batch} ({self.chosen_by}), {passes}: "
            f"{self.needed_bytes / GIB:.2f} of {self.room_bytes / GIB:.2f} GiB at most"
        )
