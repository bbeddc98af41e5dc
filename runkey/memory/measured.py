"""memory/measured.json: what training steps took on this machine, beside what was predicted.

Not an output that DVC caches: it differs from run to run.  Where it is missing, as after
`dvc pull`, or was measured for another memory.json, training goes by the prediction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from runkey.errors import TrainingError
from runkey.memory.memory_model import Line, line_through
from runkey.memory.trial import Peak

# What was measured on this machine, kept beside the store and used by the next prediction.


CALIBRATION = "memory.json"
_FORMAT = 1
_MOST_TRIALS = 200
_DRIVER = Path("/proc/driver/nvidia/version")
_LEAST = 0.5
"""No measurement lowers a bound further: what was measured ran for some steps only."""
_MARGIN = 1.01


@dataclass(frozen=True, slots=True)
class Platform:
    """What memory depends on beside the training itself."""

    device: str
    driver: str
    torch: str


@dataclass(frozen=True, slots=True)
class Trial:
    """Training steps that were run, and what they took against what was predicted."""

    platform: Platform
    model: str
    """sha256 of the memory.json that predicted."""
    images: int
    """Micro-batch."""
    upper_bytes: int
    """Predicted: what the allocator holds at most."""
    reserved_bytes: int
    """Measured: the same."""
    allocated_bytes: int
    """Measured: what tensors and workspaces took of it."""
    outside_bytes: int
    """Measured: what the process took beside it (the CUDA context, libraries' kernels)."""
    retries: int
    """Times that the allocator gave its cache back to go on."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What trials make of a prediction."""

    factor: float = 1.0
    """On upper bounds."""
    outside_bytes: int | None = None
    """None: never measured here."""
    trials: int = 0


def this_platform(device: torch.device) -> Platform:
    """The platform of a device."""
    if device.type != "cuda":
        return Platform(device.type, "", torch.__version__)
    return Platform(torch.cuda.get_device_name(device), _driver(_DRIVER), torch.__version__)


def _driver(path: Path) -> str:
    """NVIDIA's kernel driver, such as 570.86.15."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"


def read_trials(path: Path) -> tuple[Trial, ...]:
    """The trials of a machine, oldest first; none if there is no file.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != _FORMAT:
            raise ValueError("another format")
        return tuple(
            Trial(**one | {"platform": Platform(**one["platform"])}) for one in tree["trials"]
        )
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(
            f"{path}: no trials of this version ({error}); delete it, the next "
            "`dvc repro -f profile_memory` on a GPU writes it anew"
        ) from None


def add_trials(path: Path, new: Sequence[Trial]) -> None:
    """Add trials; of one platform, model and micro-batch the latest is kept."""
    same = {(one.platform, one.model, one.images) for one in new}
    old = [t for t in read_trials(path) if (t.platform, t.model, t.images) not in same]
    trials = [asdict(one) for one in (*old, *new)][-_MOST_TRIALS:]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"format": _FORMAT, "trials": trials}, indent=1) + "\n", "utf-8")
    part.replace(path)


def correction(trials: Sequence[Trial], platform: Platform, model: str) -> Correction:
    """What the trials of a platform say of a prediction.

    Trials of this very model of memory correct it both ways; those of others only upwards, since
    what they had left over need not be left over here.

    Args:
        trials: from `read_trials`.
        platform: that of the device at hand.
        model: sha256 of memory.json.
    """
    here = [t for t in trials if t.platform == platform and not t.retries]
    if not here:
        return Correction()
    own = [t.reserved_bytes / t.upper_bytes for t in here if t.model == model]
    others = [t.reserved_bytes / t.upper_bytes for t in here if t.model != model]
    factor = max(_LEAST, max(own) * _MARGIN) if own else max(1.0, max(others) * _MARGIN)
    return Correction(factor, max(t.outside_bytes for t in here), len(here))


MEASURED = "measured.json"


def write_cpu(folder: Path, model: str, platform: Platform, peaks: Sequence[Peak]) -> Line:
    """Write the peaks of a CPU and the line through them; returns the line.

    Args:
        folder: profile_memory's output.
        model: sha256 of its memory.json.
        platform: the machine.
        peaks: two or more.
    """
    first, *_, last = [(peak.images, peak.bytes) for peak in peaks]
    line = line_through(first, last)
    _write(
        folder,
        {
            "model": model,
            "platform": asdict(platform),
            "peaks": [asdict(peak) for peak in peaks],
            "line": asdict(line),
        },
    )
    return line


def write_gpu(folder: Path, model: str, trials: Sequence[Trial]) -> None:
    """Write the trials on a GPU."""
    _write(folder, {"model": model, "trials": [asdict(trial) for trial in trials]})


def read_line(folder: Path, model: str) -> Line | None:
    """A CPU's line that was measured for the memory.json with this sha256; None: there is none."""
    path = folder / MEASURED
    if not path.is_file():
        return None
    tree = json.loads(path.read_text(encoding="utf-8"))
    return Line(**tree["line"]) if tree["model"] == model and "line" in tree else None


def _write(folder: Path, content: dict[str, object]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (folder / MEASURED).write_text(text, encoding="utf-8")
