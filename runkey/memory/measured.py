"""memory/measured.json: what training steps took on this machine, beside what was predicted.

Not an output that DVC caches: it differs from run to run.  Where it is missing, as after
`dvc pull`, or was measured for another memory.json, training goes by the prediction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from runkey.memory.calibration import Platform, Trial
from runkey.memory.line import Line, line_through
from runkey.memory.trial import Peak

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
