"""All pictures of an evaluation, from the files that `prepare` and `evaluate` wrote."""

from __future__ import annotations

from pathlib import Path

from runkey.data.index import read_classes, read_index
from runkey.evaluation.detections import read_results
from runkey.evaluation.files import PRECISION_RECALL, PREDICTIONS
from runkey.plots.precision_recall import precision_recall
from runkey.plots.sheets import detection_sheet


def write_evaluation_plots(
    prepared: Path, evaluation: Path, data_folder: Path, out: Path, *, images: int = 8
) -> list[Path]:
    """Draw the best and the worst images and the precision-recall curves into a folder.

    Args:
        prepared: the folder with classes.json and val.json.
        evaluation: the folder with predictions.json and precision_recall.json.
        data_folder: what `Record.file` is relative to.
        out: the folder; made if it is not there.
        images: in each sheet; 0: no sheets.

    Returns:
        The written files.

    Raises:
        DataError: a file is missing; says which, and what to run.
    """
    written = [precision_recall(evaluation / PRECISION_RECALL, out / "precision_recall.png")]
    if images:
        records, classes = (
            read_index(prepared / "val.json"),
            read_classes(prepared / "classes.json"),
        )
        predictions = read_results(evaluation / PREDICTIONS)
        for best in (True, False):
            path = out / ("best.jpg" if best else "worst.jpg")
            written.append(
                detection_sheet(
                    records, classes, predictions, data_folder, path, best=best, images=images
                )
            )
    return written
