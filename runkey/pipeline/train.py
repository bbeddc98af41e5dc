"""What the train stage does when it is to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runkey import paths
from runkey.data.cache import open_cache
from runkey.identity.key import Recipe
from runkey.memory.choose import MemoryPlan
from runkey.memory.decide import decide
from runkey.memory.measured import CALIBRATION
from runkey.model.model_files import Sizes, save_model
from runkey.model.weights import load_initial_weights
from runkey.params import Params
from runkey.pipeline.once import KeyClaim
from runkey.pipeline.parts import Validation, write_json
from runkey.pipeline.ranks import Learner, build_learner, count_ranks, joined
from runkey.pipeline.record import Run, keep, recorded
from runkey.plots.hints import class_scores
from runkey.plots.live import HintingTracker
from runkey.progress import tell
from runkey.tracking import SAMPLES
from runkey.training.checkpoint.folder import FolderCheckpoints, Interval, newest_fingerprint
from runkey.training.checkpoint.lock import locked
from runkey.training.device import choose_device
from runkey.training.distributed import World
from runkey.training.interrupts import Interrupts
from runkey.training.loop import fit
from runkey.training.state import FitResult


def train(params: Params, root: Path, recipe: Recipe, turn: KeyClaim) -> None:
    """Train a model on the prepared data of `root`, write the stage's outputs, record the run.

    What an interrupted training left in the turn's folder is gone on with.
    """
    with Interrupts() as interrupts, locked(turn.folder, tell):
        device, reason = choose_device(params.runtime.device)
        plan = _plan(params, root, turn, device)
        with joined(params, device) as world:
            world.share(plan)
            ranks = "" if world.size == 1 else f"{world.size} processes, this one on "
            tell(f"{ranks}device {device} ({reason})")
            learner = build_learner(params, root, plan, device, world)
            dtype = learner.validation.precision.dtype
            run = Run(params, root, recipe, turn, plan, device, dtype, world.size)
            _train(run, learner, world, interrupts)


def _train(run: Run, learner: Learner, world: World, interrupts: Interrupts) -> None:
    params, root, turn = run.params, run.root, run.turn
    model, validation = learner.model, learner.validation
    names = [one.name for one in validation.classes]
    for line in load_initial_weights(model, params.model, names, root).lines():
        tell(line)
    with recorded(run) as tracker, _checkpoints(run) as checkpoints:
        assert tracker.jsonl
        hinting = HintingTracker(
            tracker.jsonl,
            tracker.jsonl.path,
            turn.folder / SAMPLES.name,
            params.flat(runtime=True),
            tell,
        )

        def judge(module: nn.Module) -> Mapping[str, float]:
            turn.check()
            evaluation = validation(module, by_size=False)
            hinting.note_scores(class_scores(evaluation.result.per_class))
            return evaluation.metrics("val/")

        result = fit(
            model,
            validation.criterion,
            learner.loader,
            judge,
            params,
            device=run.device,
            tracker=hinting,
            say=tell,
            world=world,
            checkpoints=checkpoints,
            interrupts=interrupts,
            limit=run.plan.limit_pixels,
        )
        tracker.finish_logs()
        _write_outputs(params, root, validation, result)
        run_id = keep(run, tracker)
    tell(f"model/ is written; MLflow run {run_id or 'none'}")


def _plan(params: Params, root: Path, turn: KeyClaim, device: torch.device) -> MemoryPlan:
    """How a step is cut into forward passes on this device: as the checkpoint has it, if it fits.

    Another size would round otherwise, and draw other noise.
    """
    saved = newest_fingerprint(turn.folder)
    plan = decide(
        params,
        root / paths.MEMORY,
        device,
        trials=paths.store_root() / paths.HOME / CALIBRATION,
        kept=None if saved is None else int(saved["micro_batch"]),
        # On a CPU they share the memory, and so the plan (`build_learner`).
        processes=count_ranks(params, device) if device.type == "cuda" else 1,
    )
    tell(plan.line())
    return plan


@contextmanager
def _checkpoints(run: Run) -> Iterator[FolderCheckpoints]:
    """The checkpoints in the turn's folder; what is being written then is whole afterwards."""
    checkpoints = FolderCheckpoints(
        run.turn.folder,
        {
            "key": run.recipe.key,
            "micro_batch": run.plan.micro_batch,
            "world_size": run.world_size,
            "device": run.device.type,
            "precision": run.precision,
        },
        tell,
        interval=Interval(run.params.runtime.checkpoint_seconds),
    )
    try:
        yield checkpoints
    finally:
        checkpoints.finish()


def _write_outputs(params: Params, root: Path, validation: Validation, result: FitResult) -> None:
    """Write model/ and metrics/train.json."""
    cached = open_cache(root / paths.PREPARED, "val") is not None
    sizes = Sizes(max(params.data.short_sides), params.data.long_side, cached)
    save_model(root / paths.MODEL, result.best_state, params.model, validation.classes, sizes)
    write_json(root / paths.METRICS / "train.json", _metrics(result))


def _metrics(result: FitResult) -> dict[str, Any]:
    """metrics/train.json: few numbers, since `dvc metrics show` prints them in one line."""
    return {
        "seconds": round(result.seconds, 1),
        "epochs": round(result.history[-1]["epoch"]),
        "best_epoch": result.best_epoch,
        "train_loss": result.history[-1]["train/epoch_loss"],
    }
