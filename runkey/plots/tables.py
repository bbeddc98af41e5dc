"""CSV tables that `dvc plots show` and `dvc plots diff` draw."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from runkey.evaluation.files import read_precision_recall
from runkey.evaluation.per_image import Confusion
from runkey.plots.log import Point, read_log

_MAX_ROWS = 2000  # more than the pixels of a screen only make DVC's page slow
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

    Epochs without an evaluation have no row in evaluations.csv: DVC draws an empty cell as zero.

    Args:
        log: logs/train.jsonl.
        out: the folder; made if it is not there.

    Returns:
        The written files; points that lack a value which others have are left out.

    Raises:
        DataError: there is no log.
    """
    training = read_log(log)
    every = max(1, -(-len(training.steps) // _MAX_ROWS))
    steps = [(point.step, point) for point in training.steps[::every]]
    epochs = [(_epoch(point, n), point) for n, point in enumerate(training.epochs, start=1)]
    return [
        _write(out / f"{name}.csv", [index, *columns], _complete_rows(points, columns))
        for name, index, points, columns in (
            ("steps", "step", steps, _STEP_COLUMNS),
            ("epochs", "epoch", epochs, _EPOCH_COLUMNS),
            ("evaluations", "epoch", epochs, _EVALUATION_COLUMNS),
        )
    ]


def write_confusion_table(counted: Confusion, names: Sequence[str], path: Path) -> Path:
    """Write a row for each object and each false positive, which DVC's template counts.

    Args:
        counted: the counts.
        names: of the classes; the brackets of the others keep them apart in DVC's order by name.
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
    """Write precision at IoU 0.5 of each class at 21 recalls.

    Args:
        curves: evaluation/precision_recall.json.
        path: the CSV: class, recall, precision.

    Raises:
        DataError: there is no such file.
    """
    stored = read_precision_recall(curves)
    rows = (
        [one["name"], recall, precision]
        for one in stored["classes"]
        if one["precision"] is not None
        for recall, precision in list(zip(stored["recall"], one["precision"][0], strict=True))[::5]
    )
    return _write(path, ["class", "recall", "precision"], rows)


def _epoch(point: Point, number: int) -> int:
    """Return the epoch that a point ends; its place in the log if no epoch was logged."""
    epoch = point.values.get("train/epoch", math.nan)
    return round(epoch) if math.isfinite(epoch) else number


def _complete_rows(
    points: Sequence[tuple[int, Point]], columns: Mapping[str, str]
) -> list[list[str]]:
    """Return a row for each point that has every value which any point has."""
    rows = [
        [
            f"{value:.6g}" if math.isfinite(value := point.values.get(name, math.nan)) else ""
            for name in columns.values()
        ]
        for _, point in points
    ]
    used = [any(cells) for cells in zip(*rows, strict=True)]
    return [
        [str(index), *cells]
        for (index, _), cells in zip(points, rows, strict=True)
        if any(used) and all(cell or not seen for cell, seen in zip(cells, used, strict=True))
    ]


def _write(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
