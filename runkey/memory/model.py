"""memory/memory.json: the model of memory, which training chooses its micro-batch by.

It follows from parameters and annotations alone: no measured number, the same bytes on any machine.
All bytes are those of CUDA's caching allocator; what lies outside of it (the context, other
processes) is added when a device is known, see `runkey.memory.choose`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runkey.errors import TrainingError
from runkey.memory.census import Census
from runkey.memory.fragments import Replay
from runkey.memory.line import Line

MODEL = "memory.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a training step of the worst shape, for micro-batches of 1, 2, ... images."""

    line: Line
    """Bytes that tensors take at the peak, from two images on."""
    allocated_bytes: tuple[int, ...]
    """The same for each micro-batch; of one image, of the largest single image."""
    upper_bytes: tuple[int, ...]
    """What the allocator holds at most, fragments and kernels' workspaces included."""

    def upper(self, images: int) -> int:
        """`upper_bytes` of a micro-batch; beyond the batch size, as much more as images more."""
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
    """See `runkey.memory.alternatives`."""
    change: str
    """As params.yaml writes it."""
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A trace that the model did not see, against what the model says of it."""

    images: int
    height: int
    width: int
    traced_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """All that is known of a training's memory before it has run."""

    batch_size: int
    """Images of an optimizer step."""
    precision: str
    """fp32, bf16 or fp16: what a current GPU would compute in."""
    census: Census
    gpu: Estimate
    cpu: Line
    """Bytes of tensors in the precision of a CPU, which for `auto` is fp32."""
    gradient_bytes: int
    """What data parallel training adds: buckets as large as all gradients."""
    confirmation: Confirmation
    replays: tuple[Replay, ...]
    loose_blocks: int
    """Blocks whose size follows no law and is bounded."""
    alternatives: tuple[Alternative, ...]

    def alternative(self, name: str) -> Alternative | None:
        """The one of that name, if it was looked at."""
        return next((one for one in self.alternatives if one.name == name), None)

    def limit_pixels(self, images: int) -> int:
        """Padded pixels of the largest batch that micro-batches of `images` are vouched for."""
        height, width = self.census.worst_of(images)
        return images * height * width


def write_model(folder: Path, model: MemoryModel) -> None:
    """Write memory.json into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT} | asdict(model), indent=1, allow_nan=False)
    # Lists of numbers on one line each: there is one number an image.
    text = re.sub(r"\[[\s\d,]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    (folder / MODEL).write_text(text + "\n", encoding="utf-8")


def read_model(path: Path, batch_size: int | None = None) -> MemoryModel:
    """Read memory/memory.json.

    Args:
        path: the file.
        batch_size: `training.batch_size`; the model must be for this one.  None: any.

    Raises:
        TrainingError: it is not there, not a model of memory, or for another batch size.
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
    shapes = ("largest", "worst", "worst_ungrouped", "worst_grouped", "objects")
    census = fields["census"] | {name: tuple(fields["census"][name]) for name in shapes}
    return MemoryModel(
        **fields
        | {
            "census": Census(**census),
            "gpu": _estimate(fields["gpu"]),
            "cpu": Line(**fields["cpu"]),
            "confirmation": Confirmation(**fields["confirmation"]),
            "replays": tuple(Replay(**one) for one in fields["replays"]),
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
