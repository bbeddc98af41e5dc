"""What the stage `plots` does (`runkey draw`): every picture and table of a run, and its report.

Everything is drawn from the run's files, so that nothing is trained or evaluated again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from runkey import paths
from runkey.data.index import index_file, read_classes, read_index
from runkey.files import copy_atomically
from runkey.params import Params, load_params
from runkey.pipeline.record import FinishedRun
from runkey.plots.curves import write_plot_tables, write_training_plots
from runkey.plots.evaluation import write_evaluation_plots
from runkey.plots.report import recorded_run, workspace_run, write_report
from runkey.plots.sheets import contact_sheet

REPORT = paths.PLOTS / "report.html"


def draw(root: Path) -> None:
    """Write plots/ of a workspace anew, and add its files to the MLflow run.

    If logs/, evaluation/, prepared/ or run.json is missing, the error names the stage to run.
    """
    params = load_params(root / paths.PARAMS)
    run = FinishedRun(params, root)  # first: MLflow is opened while we draw
    out = root / paths.PLOTS
    with tempfile.TemporaryDirectory() as folder:
        drawn = _draw_pictures(params, root, Path(folder))
        for path in drawn:
            copy_atomically(path, out / path.name)
        names = {path.name for path in (*drawn, REPORT)}
        for path in out.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shown = recorded_run(run.record, root) if run.record else workspace_run(root)
    write_report([shown], root / REPORT)
    run.add_pictures(REPORT)


def _draw_pictures(params: Params, root: Path, out: Path) -> list[Path]:
    prepared, evaluation = root / paths.PREPARED, root / paths.EVALUATION
    data = root / params.data.path
    write_plot_tables(root / paths.TRAIN_LOG, out)
    write_training_plots(root / paths.TRAIN_LOG, out)
    write_evaluation_plots(prepared, evaluation, data, out, images=params.evaluate.sheet_images)
    train, classes = (
        read_index(index_file(prepared, "train")),
        read_classes(prepared / "classes.json"),
    )
    contact_sheet(train, classes, data, out / "contact_sheet.jpg")
    return sorted(out.iterdir())
