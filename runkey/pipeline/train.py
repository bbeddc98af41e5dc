"""The train stage, on one process or several ranks.

Started by `dvc repro`, rank 0 launches the other ranks itself, if `runtime.processes` asks for
some. Under torchrun all are there from the start; those that are not 0 wait for rank 0's decision.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from runkey import paths
from runkey.errors import Interrupted, RecipeError
from runkey.files import write_json
from runkey.identity.inputs import check_unchanged
from runkey.identity.key import Recipe
from runkey.memory.choose import MemoryPlan, plan_memory
from runkey.memory.measure import CALIBRATION
from runkey.model.backbones import strides_of
from runkey.model.weights import CardClass, ModelCard, Sizes, save_model
from runkey.params import Params
from runkey.pipeline.initial_weights import get_initial_weights, pretrained_of
from runkey.pipeline.once import KeyClaim
from runkey.pipeline.record import Run, recorded, save_run
from runkey.pipeline.share import receive_checkpoint, shared_checkpoints
from runkey.pipeline.validation import build_validation
from runkey.plots.hints import HintingTracker, class_scores, data_facts
from runkey.tracking.replay import clear_training
from runkey.training.build import TrainContext, TrainData, build_training
from runkey.training.checkpoint import (
    Fingerprint,
    FolderCheckpoints,
    Interval,
    newest_fingerprint,
)
from runkey.training.device import choose_device
from runkey.training.distributed import (
    Interrupts,
    LostRankError,
    SharedError,
    count_ranks,
    join_world,
    read_world,
)
from runkey.training.lock import locked
from runkey.training.loop import fit
from runkey.training.rank_monitor import RankMonitor
from runkey.training.ranks import launched_ranks
from runkey.units import counted

logger = logging.getLogger(__name__)

_COMMAND = ["-m", "stages.train", *(one for one in sys.argv[1:] if one == "--traceback")]
"""What the interpreter is started with for each other rank."""


def train(params: Params, root: Path, recipe: Recipe, claim: KeyClaim | None) -> None:
    """Train a model on the prepared data of `root`, write the stage's outputs, record the run.

    An interrupted training is resumed from the checkpoints in the claim's folder. Without a claim
    only tell the ranks that torchrun launched that there is nothing to train.

    Raises:
        RecipeError: what it reads is not, or not any more, what the key says.
    """
    if claim is None:
        _dismiss(params)
        return
    # All code is imported now, maybe hours after the key was made: others may have trained it.
    check_unchanged(root, recipe)
    runtime, batch_size = params.runtime, params.training.batch_size
    get_initial_weights(params, root)
    with Interrupts() as interrupts, locked(claim.folder):
        device, reason = choose_device(runtime.device)
        ranks = count_ranks(runtime.processes, device, batch_size)
        receive_checkpoint(claim, params, root)
        saved = newest_fingerprint(claim.folder)
        plan = plan_memory(
            params,
            root / paths.MEMORY,
            device,
            trials=paths.store_root() / paths.HOME / CALIBRATION,
            # Another micro-batch would round differently, and draw other noise.
            saved=None if saved is None else int(saved["micro_batch"]),
            # On a CPU the ranks share the memory, and so the micro-batch (`build_loader`).
            processes=ranks if device.type == "cuda" else 1,
        )
        logger.info(plan.line())
        with launched_ranks(ranks, _COMMAND) as monitor, join_world(device, monitor) as world:
            world.broadcast(plan)
            others = "" if world.size == 1 else f"{counted(world.size, 'process')}, this one on "
            logger.info(f"{others}device {device} ({reason})")
            data = TrainData.read(root, plan.micro_batch)
            context = build_training(params, len(data.class_names), device, world, data)
            precision = context.step.precision.name
            run = Run(params, root, recipe, claim, plan, device, precision, world.size)
            try:
                _train(run, context, interrupts)
            except RecipeError:
                # Which checkpoints have seen the changed files is not known.
                clear_training(claim.folder, everything=False)
                raise


def _train(run: Run, context: TrainContext, interrupts: Interrupts) -> None:
    params, root = run.params, run.root
    validation = build_validation(params, params.model, root, run.device)
    with recorded(run) as tracker, ExitStack() as ending:
        checkpoints = _checkpoints(run)
        ending.callback(checkpoints.finish)
        assert tracker.jsonl
        stride = strides_of(params.model)[0]
        facts = data_facts(root / paths.PREPARED / "statistics.json", params, stride)
        settings = params.flat(runtime=True)
        hinting = HintingTracker(tracker.jsonl, tracker.jsonl.path, settings, facts)

        def evaluate(module: nn.Module) -> Mapping[str, float]:
            run.check(at_end=False)
            evaluation = validation(module)
            hinting.set_class_scores(class_scores(evaluation.result.per_class))
            return evaluation.metrics("val/")

        with shared_checkpoints(run.claim, params):
            result = fit(
                context,
                evaluate,
                tracker=hinting,
                checkpoints=checkpoints,
                interrupts=interrupts,
                limit=run.plan.limit_pixels,
            )
        tracker.finish_logs()
        assert result.best
        section = params.data
        shorter, longer = max(section.short_sides), section.long_side
        sizes = Sizes(shorter, longer, section.intensity_range)
        classes = tuple(CardClass(c.index, c.id, c.name) for c in validation.classes)
        card = ModelCard(params.model, classes, sizes, pretrained_of(params, root))
        save_model(root / paths.MODEL, result.best_weights, card)
        # Few numbers, since `dvc metrics show` prints them in one line.
        last = result.history[-1]
        metrics = {
            "seconds": round(result.seconds, 1),
            "epochs": round(last["epoch"]),
            "best_epoch": result.best.epoch,
            "train_loss": last["train/epoch_loss"],
        }
        write_json(root / paths.METRICS / "train.json", metrics)
        run_id = save_run(run, tracker)
    logger.info(f"model/ is written; MLflow run {run_id or 'none'}")


def _checkpoints(run: Run) -> FolderCheckpoints:
    fingerprint: Fingerprint = {
        "key": run.recipe.key,
        "micro_batch": run.plan.micro_batch,
        "world_size": run.world_size,
        "device": run.device.type,
        "precision": run.precision,
    }
    interval = Interval(run.params.runtime.checkpoint_seconds)
    return FolderCheckpoints(run.claim.folder, fingerprint, interval=interval)


# Ranks other than 0.


def _dismiss(params: Params) -> None:
    device, _ = choose_device(params.runtime.device)
    with join_world(device) as world:
        world.broadcast(None)


def follow(params: Params, root: Path, monitor: RankMonitor | None) -> None:
    """Train along with rank 0, which logs and writes, and reports what ends all ranks.

    The monitor watches rank 0, if that launched this process.
    """
    try:
        with Interrupts() as interrupts:
            device, _ = choose_device(params.runtime.device, read_world().local_rank)
            with join_world(device, monitor) as world:
                plan: MemoryPlan | None = world.broadcast(None)
                if plan is None:
                    return
                data = TrainData.read(root, plan.micro_batch)
                context = build_training(params, len(data.class_names), device, world, data)
                fit(context, _never, interrupts=interrupts, limit=plan.limit_pixels)
    except SharedError as error:
        raise SystemExit(error.exit_code) from None
    except LostRankError as error:
        if error.rank and monitor:  # rank 0, which is beside this process, reports it
            raise SystemExit(error.exit_code) from None
        raise
    except Interrupted as stop:
        raise SystemExit(stop.exit_code) from None


def _never(_: nn.Module) -> Mapping[str, float]:
    raise AssertionError("rank 0 evaluates")
