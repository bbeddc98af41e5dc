"""How the train stage records its run: while it goes on, and what it leaves behind."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runkey import paths
from runkey.data.index import ClassName
from runkey.identity.key import Recipe
from runkey.identity.manifest import make_manifest, take_witness
from runkey.memory.plan import MemoryPlan
from runkey.model.model_files import Sizes, save_model
from runkey.params import Params
from runkey.plots.curves import write_training_plots
from runkey.plots.tables import write_plot_tables
from runkey.tracking import TRAIN_LOG, RunTracker, open_run
from runkey.training.state import FitResult
from stages._parts import write_json

_PRECISION = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Run:
    """One training: what was asked for, and what it runs on."""

    params: Params
    root: Path
    recipe: Recipe
    plan: MemoryPlan
    device: torch.device
    dtype: torch.dtype | None
    """Of the autocast; None: none."""
    classes: list[ClassName]

    @property
    def device_name(self) -> str:
        """Such as `cpu x86_64` or `cuda NVIDIA H200`."""
        if self.device.type == "cuda":
            return f"cuda {torch.cuda.get_device_name(self.device)}"
        return f"{self.device.type} {platform.machine()}"


@contextmanager
def recorded(run: Run) -> Iterator[RunTracker]:
    """The run's tracker; a training that fails or is interrupted is marked so in MLflow."""
    tags = {
        "device": run.device_name,
        "micro_batch": str(run.plan.micro_batch),
        "precision": _PRECISION[run.dtype],
        "torch": torch.__version__,
    }
    tracker = open_run(
        run.params,
        run.root,
        key=run.recipe.key,
        parts=run.recipe.parts,
        tags=tags,
        counts=_data_counts(run.root),
        say=print,
    )
    try:
        yield tracker
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def keep(run: Run, result: FitResult, tracker: RunTracker) -> str | None:
    """Write the stage's outputs, and end the recording with copies of them.

    Returns:
        The MLflow run's id, None if there is none.
    """
    root, model = run.root, run.root / paths.MODEL
    data = run.params.data
    sizes = Sizes(max(data.short_sides), data.long_side)
    save_model(model, result.best_state, run.params.model, run.classes, sizes)
    write_json(model / "key.json", run.recipe.as_dict())
    write_plot_tables(root / TRAIN_LOG, root / paths.PLOTS)
    write_training_plots(root / TRAIN_LOG, root / paths.PLOTS)
    metrics = _metrics(result)
    write_json(root / paths.METRICS / "train.json", metrics)
    tracker.final({f"train/{name}": metrics[name] for name in ("seconds", "best_epoch")})
    witness = take_witness(
        root,
        run.recipe,
        device=run.device_name,
        micro_batch=run.plan.micro_batch,
        world_size=1,
        threads=torch.get_num_threads(),
        precision=_PRECISION[run.dtype],
    )
    for file in witness.undeclared_files:
        print(f"warning: {file} was imported, but is no part of the key")
    manifest = make_manifest(run.recipe, tracker.run_id(), witness)
    manifest.write(root / paths.RUN_JSON)
    for path, folder in (
        (model, "model"),
        (root / paths.PLOTS, "plots"),
        (root / paths.PARAMS, ""),
        (root / paths.RUN_JSON, ""),
    ):
        tracker.artifact(path, folder)
    run_id = tracker.close()
    if run_id != manifest.run_id:  # MLflow answered late
        replace(manifest, run_id=run_id).write(root / paths.RUN_JSON)
    return run_id


def _metrics(result: FitResult) -> dict[str, Any]:
    """metrics/train.json: few numbers, since `dvc metrics show` prints them in one line."""
    return {
        "seconds": round(result.seconds, 1),
        "epochs": round(result.history[-1]["epoch"]),
        "best_epoch": result.best_epoch,
        "loss": result.history[-1]["train/epoch_loss"],
    }


def _data_counts(root: Path) -> dict[str, int]:
    """Images and objects of each split, as prepare counted them."""
    report = json.loads((root / paths.PREPARED / "report.json").read_text(encoding="utf-8"))
    return {
        f"{split}_{what}": number
        for split, counts in report["kept"].items()
        for what, number in counts.items()
    }
