"""A small project for trainings that are killed: its training has all that has state."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from runkey.params import Params, load_params, parse_params
from runkey.params.render import render
from tests.support.project import TINY, Project, copy_repository, draw_data


def make_project(root: Path, epochs: int) -> Project:
    """The project, prepared up to the train stage."""
    project = Project(root)
    copy_repository(root)
    shutil.rmtree(root / "data", ignore_errors=True)
    draw_data(root / "data")
    (root / "params.yaml").write_text(render(parse_params(parameters(epochs)), "# kills"))
    project.run("git", "init", "-q")
    project.dvc("add", "-q", "data")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "start")
    for stage in ("prepare", "profile_memory"):
        project.run(sys.executable, "-m", f"stages.{stage}")
    return project


def parameters(epochs: int) -> dict[str, Any]:
    """Dropout, noise, an average, plateau, a partial last window, several micro-batches."""
    return {
        **TINY,
        "model": TINY["model"] | {"dropout": 0.1, "denoising": {"groups": 2}},
        "schedule": {"name": "plateau", "patience": 1},
        "training": {
            "epochs": epochs,
            "batch_size": 5,
            "micro_batch": 2,
            "ema_decay": 0.9,
            "evaluate_every": 2,
            "cpu_threads": 1,
            "early_stopping": {"enabled": False, "metric": "val/loss", "mode": "min"},
        },
        "runtime": TINY["runtime"] | {"checkpoint_seconds": 0, "log_every": 1},
    }


def set_workers(root: Path, workers: int) -> None:
    """Change `runtime.workers`, which is no part of the key."""
    params: Params = load_params(root / "params.yaml")
    runtime = params.runtime.model_copy(update={"workers": workers})
    changed = params.model_copy(update={"runtime": runtime})
    (root / "params.yaml").write_text(render(changed, "# kills"))
