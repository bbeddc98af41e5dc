"""memory/memory.json: predicted bytes of a training step, from which training picks a micro-batch.

It follows from parameters and annotations alone: the same bytes on every machine, no measurement.
All bytes are those of CUDA's caching allocator; the CUDA context and other processes are added when
a device is known (`runkey.memory.choose`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runkey.errors import TrainingError
from runkey.files import write_atomically
from runkey.memory.batch_shapes import ShapeStatistics
from runkey.memory.template import AllocatorReplay
from runkey.units import MIB

MODEL = "memory.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Line:
    """Peak bytes of a training step as a function of the images of a micro-batch."""

    base_bytes: float
    """Weights, optimizer state, libraries: what does not depend on the images."""
    bytes_per_image: float

    def at(self, images: int) -> int:
        """Return the predicted peak in bytes."""
        return round(self.base_bytes + self.bytes_per_image * images)

    def __str__(self) -> str:
        return f"{self.base_bytes / MIB:.0f} MiB + {self.bytes_per_image / MIB:.1f} MiB an image"


def line_through(first: tuple[int, int], last: tuple[int, int]) -> Line:
    """Return the line through two peaks, each (images, bytes); its slope is never negative."""
    first, last = sorted((first, last))
    slope = max(0.0, (last[1] - first[1]) / (last[0] - first[0]))
    # Through the larger peak: where noise makes the slope 0, the line stays above both.
    return Line(last[1] - slope * last[0], slope)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a training step at the largest shape, for micro-batches of 1, 2, ... images."""

    line: Line
    """Bytes of tensors at the peak, from two images on."""
    allocated_bytes: tuple[int, ...]
    """The same for each micro-batch; one image has the shape of the largest single image."""
    upper_bytes: tuple[int, ...]
    """Most bytes that the allocator holds, fragmentation and workspaces included."""

    def upper(self, images: int) -> int:
        """Return `upper_bytes` of a micro-batch, extrapolated beyond the batch size."""
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
    """A trace that the template was not made from, against what the template predicts."""

    images: int
    height: int
    width: int
    traced_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """The content of memory.json."""

    batch_size: int
    """Images of an optimizer step."""
    precision: str
    """fp32, bf16 or fp16: what a current GPU computes in."""
    shapes: ShapeStatistics
    """`census` in the file."""
    gpu: Estimate
    cpu: Line
    """Bytes of tensors in a CPU's precision, which for `auto` is fp32."""
    gradient_bytes: int
    """What data parallel training adds: one copy of the gradients."""
    confirmation: Confirmation
    replays: tuple[AllocatorReplay, ...]
    loose_blocks: int
    """Number of blocks whose size follows no law and is bounded."""
    alternatives: tuple[Alternative, ...]

    def alternative(self, name: str) -> Alternative | None:
        """Return the alternative of that name, or None if it was not predicted."""
        return next((one for one in self.alternatives if one.name == name), None)

    def limit_pixels(self, images: int) -> int:
        """Return the padded pixels of the largest batch that is predicted for a micro-batch."""
        height, width = self.shapes.worst_of(images)
        return images * height * width

    def as_dict(self) -> dict[str, Any]:
        """Return the content of memory.json."""
        return {"census" if name == "shapes" else name: x for name, x in asdict(self).items()}


def write_model(folder: Path, model: MemoryModel) -> None:
    """Write memory.json into `folder`, which is created if needed."""
    text = json.dumps({"format": FORMAT} | model.as_dict(), indent=1, allow_nan=False)
    # Lists of numbers on one line each: there is one number for each micro-batch.
    text = re.sub(r"\[[\s\d,]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_atomically(folder / MODEL, text + "\n")


def read_model(path: Path, batch_size: int | None = None) -> MemoryModel:
    """Read memory/memory.json.

    Args:
        path: the file.
        batch_size: `training.batch_size`, which the model must be for; None: any.

    Raises:
        TrainingError: it is missing, not a memory model, or for another batch size.
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
    tuples = ("largest", "worst", "worst_ungrouped", "worst_grouped", "objects")
    shapes = fields.pop("census")
    return MemoryModel(
        **fields
        | {
            "shapes": ShapeStatistics(**shapes | {name: tuple(shapes[name]) for name in tuples}),
            "gpu": _estimate(fields["gpu"]),
            "cpu": Line(**fields["cpu"]),
            "confirmation": Confirmation(**fields["confirmation"]),
            "replays": tuple(AllocatorReplay(**one) for one in fields["replays"]),
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
