"""Build a single training step for the memory room, which knows nothing of training.

Runs without mlflow, dvc and pycocotools.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from runkey import paths
from runkey.data.dataset import GlobalBatch
from runkey.data.index import read_classes
from runkey.files import write_json
from runkey.memory.measure import TrialJob, read_as, run_trial
from runkey.memory.trace.record import BuiltStep, StepFactory
from runkey.params import Params, load_params
from runkey.training.build import build_training
from runkey.training.device import choose_device
from runkey.training.step import train_step


def build_step(params: Params, num_classes: int, device: torch.device) -> BuiltStep:
    """Build a whole optimizer step of a fresh model."""
    context = build_training(params, num_classes, device)
    parts, ema = context.step, context.ema

    def step(batch: GlobalBatch) -> None:
        result = train_step(parts, batch, 1.0)
        if ema is not None:
            ema.update(result.skipped)

    return BuiltStep(step, parts.model, parts.optimizer, None if ema is None else ema.module)


def step_factory(params: Params, num_classes: int) -> StepFactory:
    """Return a function that builds the step on a device."""
    return lambda device: build_step(params, num_classes, device)


def run_trial_job(root: Path, job: Path, result: Path) -> None:
    """Run the steps of a job's file in this process and write the file with their peaks."""
    params = load_params(root / paths.PARAMS)
    device, _ = choose_device(params.runtime.device)
    num_classes = len(read_classes(root / paths.PREPARED / "classes.json"))
    asked = read_as(TrialJob, job)
    outcome = run_trial(step_factory(params, num_classes), asked, device)
    write_json(result, asdict(outcome))
