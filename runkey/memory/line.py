"""Memory as a line over the images of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

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
