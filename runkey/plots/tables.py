"""CSV tables that `dvc plots show` and `dvc plots diff` draw."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from runkey.evaluation.files import read_precision_recall
from runkey.evaluation.per_image import Confusion
from runkey.plots.log import Point, read_log

# More rows than pixels across a screen only make the page slow.
MOST_ROWS = 2000

_STEP_COLUMNS = {
    "lr": "train/lr",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "grad_norm_clipped": "train/grad_norm_clipped",
}
_EPOCH_COLUMNS = {"train_loss": "train/epoch_loss"}
_EVALUATION_COLUMNS = {"val_loss": "val/loss", "AP": "val/AP", "AP50": "val/AP50"}


def write_plot_tables(log: Path, out: Path) -> list[Path]:
    """Write steps.csv, epochs.csv and evaluations.csv of a training, finished or not.

    Not every epoch is evaluated, hence two files: DVC draws an empty cell as a zero.

    Args:
        log: logs/train.jsonl.
        out: the folder; made if it is not there.

    Returns:
        The written files; points that lack a value which others have are left out.

    Raises:
        DataError: there is no log.
    """
    content = read_log(log)
    every = max(1, -(-len(content.steps) // MOST_ROWS))
    steps = [(point.step, point) for point in content.steps[::every]]
    epochs = [(_epoch(point, n), point) for n, point in enumerate(content.epochs, start=1)]
    return [
        _write(out / "steps.csv", ["step", *_STEP_COLUMNS], _whole(steps, _STEP_COLUMNS)),
        _write(out / "epochs.csv", ["epoch", *_EPOCH_COLUMNS], _whole(epochs, _EPOCH_COLUMNS)),
        _write(
            out / "evaluations.csv",
            ["epoch", *_EVALUATION_COLUMNS],
            _whole(epochs, _EVALUATION_COLUMNS),
        ),
    ]


def write_confusion_table(counted: Confusion, names: Sequence[str], path: Path) -> Path:
    """Write a row for each object and each detection of nothing, as DVC's template counts them.

    It sorts by name; the brackets keep what is no class apart.

    Args:
        counted: the counts.
        names: of the classes.
        path: the CSV: truth, detected.
    """
    rows = (
        (truth, detected)
        for truth, counts in zip((*names, "(background)"), counted.counts, strict=True)
        for detected, count in zip((*names, "(missed)"), counts, strict=True)
        for _ in range(count)
    )
    return _write(path, ["truth", "detected"], rows)


def write_precision_recall_table(curves: Path, path: Path) -> Path:
    """Write precision at IoU 0.5 at 21 recalls of each class, one row each.

    Args:
        curves: evaluation/precision_recall.json.
        path: the CSV: class, recall, precision.

    Raises:
        DataError: there is no such file.
    """
    content = read_precision_recall(curves)
    rows = (
        [c["name"], recall, precision]
        for c in content["classes"]
        if c["precision"] is not None
        for recall, precision in list(zip(content["recall"], c["precision"][0], strict=True))[::5]
    )
    return _write(path, ["class", "recall", "precision"], rows)


def _epoch(point: Point, number: int) -> int:
    """The epoch that a point ends; its place in the log if it does not say."""
    epoch = point.values.get("train/epoch", math.nan)
    return round(epoch) if math.isfinite(epoch) else number


def _whole(points: Sequence[tuple[int, Point]], columns: Mapping[str, str]) -> list[list[str]]:
    """A row for each point that has all those values which any point has."""
    rows = [
        [
            f"{v:.6g}" if math.isfinite(v := p.values.get(name, math.nan)) else ""
            for name in columns.values()
        ]
        for _, p in points
    ]
    known = [any(cells) for cells in zip(*rows, strict=True)]
    return [
        [str(number), *cells]
        for (number, _), cells in zip(points, rows, strict=True)
        if any(known) and all(cell or not seen for cell, seen in zip(cells, known, strict=True))
    ]


def _write(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
