"""memory/memory.json: what training goes by; memory/measured.json: the numbers it came from.

The plan holds no measured number, so it has the same bytes as long as the decision is the same, and
DVC does not train anew because a peak was a page higher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from runkey.errors import TrainingError

PLAN = "memory.json"
MEASURED = "measured.json"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How an optimizer step is cut into forward passes."""

    batch_size: int
    """Images of an optimizer step."""
    micro_batch: int
    """Images of a forward pass, at most."""
    accumulation: int
    """Forward passes of a step."""
    chosen_by: str
    """measured, or training.micro_batch."""
    device: str
    """cpu or cuda: what was measured on."""
    worst_height: int
    """Padded height, pixels, of the worst batch."""
    worst_width: int
    shapes: int
    """Different output shapes of single images."""
    objects: int
    """Most boxes of an image."""


def write_plan(folder: Path, plan: MemoryPlan, measured: Mapping[str, object]) -> None:
    """Write both files into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((PLAN, asdict(plan)), (MEASURED, dict(measured))):
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def read_plan(path: Path, batch_size: int | None = None) -> MemoryPlan:
    """Read memory/memory.json.

    Args:
        path: the file.
        batch_size: `training.batch_size`; the plan must be for this one.  None: any.

    Raises:
        TrainingError: it is not there, not a plan, or for another batch size.
    """
    again = "run `dvc repro profile_memory`"
    try:
        plan = MemoryPlan(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TrainingError(f"{path}: not found; {again} first") from None
    except (ValueError, TypeError):
        raise TrainingError(f"{path}: no memory plan of this version; {again}") from None
    if batch_size is not None and batch_size != plan.batch_size:
        raise TrainingError(
            f"{path}: made for training.batch_size {plan.batch_size}, not {batch_size}; {again}"
        )
    return plan
