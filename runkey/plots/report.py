"""The page: one HTML file that holds all that it shows, and asks for nothing.

Pictures are parts of it, styles too; there is no script, and its content policy forbids a browser
to load anything.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from runkey import __version__
from runkey.plots import report_tables
from runkey.plots.canvas import drawable
from runkey.plots.curves import write_training_plots
from runkey.plots.hints import Hint
from runkey.plots.log import TrainingLog
from runkey.plots.report_source import LOG, Run
from runkey.plots.report_tables import Table, differences
from runkey.plots.style import BLACK, CYCLE, YELLOW, drawing, legend_beside, say_nothing_yet

# The pictures of a report, as parts of the page itself.


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
    # Runs of before the stage `plots` have them in evaluation/.
    return list(_stored(run, ("plots", "evaluation"), _EVALUATION))


def memory(run: Run) -> list[Picture]:
    """The pictures that the run's memory profile made."""
    return list(_stored(run, ("memory",), {"timeline": "Memory during a training step"}))


def data(run: Run) -> list[Picture]:
    """Images of the data set with their boxes."""
    titles = {"contact_sheet": "Training images with their boxes"}
    return list(_stored(run, ("plots", "prepared"), titles))


def comparison(runs: list[Run]) -> Picture:
    """The curves of several runs on one axis."""
    with tempfile.TemporaryDirectory() as folder:
        named = [(f"{run.label}  {run.name}".strip(), run.log) for run in runs]
        path = compare_curves(named, Path(folder) / "compare.png")
        return _picture(path, "AP, loss and learning rate of all runs")


def _stored(run: Run, folders: Sequence[str], titles: dict[str, str]) -> Iterator[Picture]:
    """Yield each picture from the first of the folders that has it."""
    for name, title in titles.items():
        places = (run.folder / folder / f"{name}{end}" for folder in folders for end in _TYPES)
        path = next((path for path in places if path.is_file()), None)
        if path:
            yield _picture(path, title)


def _picture(path: Path, title: str) -> Picture:
    content = base64.b64encode(path.read_bytes()).decode()
    return Picture(title, f"data:{_TYPES[path.suffix]};base64,{content}")


# Curves of several runs on one axis.


_COLOURS = [colour for colour in CYCLE if colour != YELLOW]
_PANELS = (
    ("AP of held-out images", "AP, 0 to 1", "val/AP"),
    ("Loss of held-out images", "loss, per object", "val/loss"),
    ("Loss of training, mean of each epoch", "loss, per object", "train/epoch_loss"),
    ("Learning rate", "rate per step", "train/lr"),
)
_MOST_LETTERS = 34


def compare_curves(runs: Sequence[tuple[str, TrainingLog]], path: Path) -> Path:
    """Draw AP, losses and learning rate of runs over epochs, a colour a run.

    Args:
        runs: names and logs; a log may be empty.
        path: the picture, PNG.
    """
    with drawing(path, panels=len(_PANELS), height=1.9) as (_, panels):
        for axes, (title, label, metric) in zip(panels, _PANELS, strict=True):
            axes.set_title(title)
            drawn = [_draw(axes, log, metric, number) for number, (_, log) in enumerate(runs)]
            if not any(drawn):
                say_nothing_yet(axes)
                continue
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if metric == "train/lr":
                axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        for number, (name, _) in enumerate(runs):
            panels[0].plot([], [], color=_colour(number), linestyle=_dash(number), label=_cut(name))
        legend_beside(panels[0])
        panels[-1].set_xlabel("epoch")
    return path


def _draw(axes: Any, log: TrainingLog, metric: str, number: int) -> bool:
    """One run's curve, with a star at the weights that it kept; False if it has none."""
    epochs, values = _by_epoch(log, metric)
    if not np.isfinite(values).any():
        return False
    marker = "o" if len(epochs) <= 40 else ""
    axes.plot(
        epochs,
        values,
        color=_colour(number),
        linestyle=_dash(number),
        marker=marker,
        markersize=3,
    )
    best = log.best_step()
    per_epoch = log.steps_per_epoch
    if metric == "val/AP" and best is not None and per_epoch:
        at = np.argmin(np.abs(epochs - best / per_epoch))
        axes.plot(
            epochs[at],
            values[at],
            color=_colour(number),
            marker="*",
            markersize=13,
            markeredgecolor=BLACK,
            markeredgewidth=0.6,
            zorder=5,
        )
    return True


def _by_epoch(log: TrainingLog, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs, whole or not, and the values at them: runs may differ in steps an epoch."""
    steps, values = log.of_steps(metric) if metric == "train/lr" else log.of_epochs(metric)
    return steps / (log.steps_per_epoch or 1.0), values


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _dash(number: int) -> str:
    return ("-", "--", ":", "-.")[number // len(_COLOURS) % 4]


def _cut(name: str) -> str:
    text = drawable(name, "run")
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


_FOLDER = Path(__file__).parent
_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Section:
    """All of one run."""

    run: Run
    head: Table
    parts: Table
    scores: Table
    classes: Table
    changed: Table
    parameters: Table
    environment: Table
    data: Table
    hints: list[Hint]
    happened: Table
    evaluation: list[Picture]
    curves: list[Picture]
    memory: list[Picture]
    images: list[Picture]


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Write a page about a run, or about several with what differs between them on top.

    Args:
        runs: at least one.
        path: the HTML file; its folder is made.

    Returns:
        The path.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    several = len(runs) > 1
    page = environment.get_template(_TEMPLATE).render(
        title=", ".join(f"{run.label} {run.name}".strip() for run in runs),
        sections=[_section(run) for run in runs],
        differences=differences(runs) if several else None,
        curves=comparison(list(runs)) if several else None,
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _section(run: Run) -> Section:
    return Section(
        run=run,
        head=report_tables.head(run),
        parts=report_tables.key_parts(run),
        scores=report_tables.scores(run),
        classes=report_tables.classes(run),
        changed=report_tables.changed(run),
        parameters=report_tables.every_parameter(run),
        environment=report_tables.environment(run),
        data=report_tables.data(run),
        hints=run.hints(),
        happened=report_tables.happened(run),
        evaluation=evaluation(run),
        curves=curves(run),
        memory=memory(run),
        images=data(run),
    )
