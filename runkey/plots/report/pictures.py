"""The pictures of a report, as parts of the page itself."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runkey.plots.curves import write_training_plots
from runkey.plots.report.compare_curves import compare_curves
from runkey.plots.report.source import LOG, Run

_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_CURVES = {
    "loss_and_ap": "Loss and AP, with the weights that were kept",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm before and after clipping",
    "throughput": "Images per second, and waiting for data",
    "machine": "CPU, GPU and memory",
}
_EVALUATION = {
    "precision_recall": "Precision and recall",
    "confusion": "Confusion, with the background",
    "ap_by_size": "AP by size",
    "calibration": "Calibration of the scores",
    "best": "Detections that went well, beside the truth",
    "worst": "Detections that went badly, beside the truth",
}


@dataclass(frozen=True)
class Picture:
    """One picture."""

    title: str
    source: str
    """`data:image/png;base64,...`"""


def curves(run: Run) -> list[Picture]:
    """The curves of a run, drawn from its log: of a run that was interrupted as well."""
    if not (run.folder / LOG).is_file():
        return []
    with tempfile.TemporaryDirectory() as folder:
        written = write_training_plots(run.folder / LOG, Path(folder))
        shown = [path for path in written if path.stem != "machine" or run.samples]
        return [_picture(path, _CURVES[path.stem]) for path in shown]


def evaluation(run: Run) -> list[Picture]:
    """The pictures that the run's evaluation made."""
    return list(_stored(run, "evaluation", _EVALUATION))


def memory(run: Run) -> list[Picture]:
    """The pictures that the run's memory profile made."""
    return list(_stored(run, "memory", {"timeline": "Memory during a training step"}))


def data(run: Run) -> list[Picture]:
    """Images of the data set with their boxes."""
    return list(_stored(run, "prepared", {"contact_sheet": "Training images with their boxes"}))


def comparison(runs: list[Run]) -> Picture:
    """The curves of several runs on one axis."""
    with tempfile.TemporaryDirectory() as folder:
        named = [(f"{run.label}  {run.name}".strip(), run.log) for run in runs]
        path = compare_curves(named, Path(folder) / "compare.png")
        return _picture(path, "AP, loss and learning rate of all runs")


def _stored(run: Run, folder: str, titles: dict[str, str]) -> Iterator[Picture]:
    for name, title in titles.items():
        for ending in _TYPES:
            path = run.folder / folder / f"{name}{ending}"
            if path.is_file():
                yield _picture(path, title)


def _picture(path: Path, title: str) -> Picture:
    content = base64.b64encode(path.read_bytes()).decode()
    return Picture(title, f"data:{_TYPES[path.suffix]};base64,{content}")
