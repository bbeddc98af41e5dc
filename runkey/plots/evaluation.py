"""All pictures of an evaluation, from the files that `prepare` and `evaluate` wrote."""

from __future__ import annotations

from pathlib import Path

from runkey.data.index import read_classes, read_index
from runkey.evaluation.calibration import calibration
from runkey.evaluation.confusion import confusion
from runkey.evaluation.detections import read_results
from runkey.evaluation.files import METRICS, PRECISION_RECALL, PREDICTIONS
from runkey.evaluation.per_image import judge_images
from runkey.plots.by_size import ap_by_size
from runkey.plots.calibration import LEAST_SCORE, reliability
from runkey.plots.confusion import confusion_matrix
from runkey.plots.marks import class_name
from runkey.plots.precision_recall import precision_recall
from runkey.plots.sheets import detection_sheet
from runkey.plots.tables import write_confusion_table


def write_evaluation_plots(
    prepared: Path, evaluation: Path, data_folder: Path, out: Path, *, images: int = 8
) -> list[Path]:
    """Draw curves, confusion, sizes and calibration, and the best and the worst images.

    Args:
        prepared: the folder with classes.json and val.json.
        evaluation: the folder with metrics.json, predictions.json and precision_recall.json.
        data_folder: what `Record.file` is relative to.
        out: the folder; made if it is not there.
        images: in each sheet; 0: no sheets.

    Returns:
        The written pictures; the table beside them is for `dvc plots`.

    Raises:
        DataError: a file is missing; says which, and what to run.
    """
    records, classes = read_index(prepared / "val.json"), read_classes(prepared / "classes.json")
    judged = judge_images(records, classes, read_results(evaluation / PREDICTIONS))
    names = [class_name(one) for one in classes]
    counted = confusion(judged, len(classes))
    written = [
        precision_recall(evaluation / PRECISION_RECALL, out / "precision_recall.png"),
        confusion_matrix(counted, names, out / "confusion.png"),
        ap_by_size(evaluation / METRICS, out / "ap_by_size.png"),
        reliability(calibration(judged, LEAST_SCORE), out / "calibration.png"),
    ]
    write_confusion_table(counted, names, out / "confusion.csv")
    if images:
        for best in (True, False):
            path = out / ("best.jpg" if best else "worst.jpg")
            written.append(
                detection_sheet(judged, classes, data_folder, path, best=best, images=images)
            )
    return written
