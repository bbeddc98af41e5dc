"""The report: one HTML file about a run, or about what differs between several.

Pictures and styles are part of the file. It has no script, and its content policy forbids a browser
to load anything else, so that it opens offline.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from runkey import __version__
from runkey.files import write_atomically
from runkey.plots import report_data
from runkey.plots.curves import write_training_plots
from runkey.plots.log import TrainingLog
from runkey.plots.report_data import LOG, ReportedRun
from runkey.plots.sheets import printable
from runkey.plots.style import (
    BLACK,
    CYCLE,
    YELLOW,
    cut,
    drawing,
    legend_beside,
    marker,
    show_empty,
)

_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_CURVES = {
    "loss_and_ap": "Loss and AP",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm before and after clipping",
    "throughput": "Images per second, and waiting for data",
    "machine": "CPU, GPU and memory",
}
_EVALUATION = {
    "precision_recall": "Precision and recall",
    "confusion": "Confusion matrix",
    "ap_by_size": "AP by object size",
    "calibration": "Calibration of the scores",
    "best": "Best images: ground truth beside detections",
    "worst": "Worst images: ground truth beside detections",
}
_COMPARED = {
    "Validation AP": ("AP, 0 to 1", "val/AP"),
    "Validation loss": ("loss per object", "val/loss"),
    "Training loss, mean of each epoch": ("loss per object", "train/epoch_loss"),
    "Learning rate": ("learning rate", "train/lr"),
}
_COLOURS = [colour for colour in CYCLE if colour != YELLOW]


class Picture(NamedTuple):
    """A picture that is part of the page."""

    title: str
    source: str
    """`data:image/png;base64,...`"""


def write_report(runs: Sequence[ReportedRun], path: Path) -> Path:
    """Write a page about a run, or about several with their differences on top."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    several = len(runs) > 1
    page = environment.get_template("page.html.jinja").render(
        title=", ".join(f"{run.label} {run.run.name}".strip() for run in runs),
        runs=runs,
        tables=report_data,
        pictures=[_pictures(run) for run in runs],
        differences=report_data.differences(runs) if several else None,
        comparison=_comparison(runs) if several else None,
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )
    write_atomically(path, page)
    return path


def _pictures(run: ReportedRun) -> dict[str, list[Picture]]:
    contact_sheet = {"contact_sheet": "Training images with their boxes"}
    return {
        "curves": _curves(run),
        # Runs from before the stage `plots` have their pictures in evaluation/ and prepared/.
        "evaluation": _stored(run, ("plots", "evaluation"), _EVALUATION),
        "memory": _stored(run, ("memory",), {"timeline": "Memory during a training step"}),
        "images": _stored(run, ("plots", "prepared"), contact_sheet),
    }


def _curves(run: ReportedRun) -> list[Picture]:
    """Draw the curves of a run from its log, which an interrupted run has as well."""
    if not (run.folder / LOG).is_file():
        return []
    with tempfile.TemporaryDirectory() as folder:
        written = write_training_plots(run.folder / LOG, Path(folder))
        shown = [path for path in written if path.stem != "machine" or run.samples]
        return [_embedded(path, _CURVES[path.stem]) for path in shown]


def _comparison(runs: Sequence[ReportedRun]) -> Picture:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compare.png"
        _compare_curves(runs, path)
        return _embedded(path, "AP, loss and learning rate of all runs")


def _stored(run: ReportedRun, folders: Sequence[str], titles: dict[str, str]) -> list[Picture]:
    """Return each picture that a run has, from the first of the folders that has it."""
    pictures = []
    for name, title in titles.items():
        places = (run.folder / folder / f"{name}{end}" for folder in folders for end in _TYPES)
        path = next((path for path in places if path.is_file()), None)
        if path:
            pictures.append(_embedded(path, title))
    return pictures


def _embedded(path: Path, title: str) -> Picture:
    data = base64.b64encode(path.read_bytes()).decode()
    return Picture(title, f"data:{_TYPES[path.suffix]};base64,{data}")


def _compare_curves(runs: Sequence[ReportedRun], path: Path) -> None:
    """Draw AP, losses and learning rate of several runs over epochs."""
    looks = islice(cycle(product(("-", "--", ":", "-."), _COLOURS)), len(runs))
    named = [{"linestyle": dashes, "color": colour} for dashes, colour in looks]
    styled = list(zip(runs, named, strict=True))
    with drawing(path, *_COMPARED, height=1.9) as (_, panels):
        for axes, (label, metric) in zip(panels, _COMPARED.values(), strict=True):
            for run, look in styled:
                _draw(axes, run.log, metric, look)
            if not axes.lines:
                show_empty([axes])
                continue
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if metric == "train/lr":
                axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        for run, look in styled:
            name = printable(f"{run.label}  {run.run.name}".strip(), "run")
            panels[0].plot([], [], **look, label=cut(name, 34))
        legend_beside(panels[0])
        panels[-1].set_xlabel("epoch")


def _draw(axes: Any, log: TrainingLog, metric: str, look: dict[str, str]) -> None:
    """Draw one run's curve, if it has one, with a star at its best epoch."""
    steps, values = log.of_steps(metric) if metric == "train/lr" else log.of_epochs(metric)
    if not np.isfinite(values).any():
        return
    per_epoch = log.steps_per_epoch
    epochs = steps / (per_epoch or 1.0)
    axes.plot(epochs, values, **look, marker=marker(epochs), markersize=3)
    best = log.best_step()
    if metric == "val/AP" and best is not None and per_epoch:
        at = np.argmin(np.abs(epochs - best / per_epoch))
        star: dict[str, Any] = {"marker": "*", "markersize": 13, "zorder": 5}
        star |= {"color": look["color"], "markeredgecolor": BLACK, "markeredgewidth": 0.6}
        axes.plot(epochs[at], values[at], **star)
