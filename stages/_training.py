"""What the train stage does when it is to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from runkey import paths
from runkey.data.loader import TrainLoader, build_train_loader
from runkey.identity.key import Recipe
from runkey.memory.plan import PLAN, read_plan
from runkey.model.detr import build_model
from runkey.model.model_files import Sizes, save_model
from runkey.model.weights import load_initial_weights
from runkey.params import Params
from runkey.plots.curves import write_training_plots
from runkey.plots.hints import CLASS_SCORES, class_scores
from runkey.plots.live import HintingTracker
from runkey.plots.tables import write_plot_tables
from runkey.tracking import SAMPLES, TRAIN_LOG
from runkey.training.device import choose_device
from runkey.training.loop import fit
from runkey.training.seed import set_up
from runkey.training.state import FitResult
from stages._once import Turn
from stages._parts import Validation, build_validation, write_json
from stages._record import Run, keep, recorded


def train(params: Params, root: Path, recipe: Recipe, turn: Turn) -> None:
    """Train a model on the prepared data of `root`, write the stage's outputs, record the run."""
    device, reason = choose_device(params.runtime.device)
    print(f"device {device} ({reason})")
    plan = read_plan(root / paths.MEMORY / PLAN, params.training.batch_size)
    set_up(
        params.seed,
        deterministic=params.training.deterministic,
        cpu_threads=params.training.cpu_threads,
    )
    validation = build_validation(params, params.model, root, device)
    names = [one.name for one in validation.classes]
    model = build_model(params.model, len(names))
    for line in load_initial_weights(model, params.model, names, root).lines():
        print(line)
    loader = _loader(params, root, plan.micro_batch)
    run = Run(params, root, recipe, turn, plan, device, validation.precision.dtype)
    with recorded(run) as tracker:
        hinting = HintingTracker(
            tracker,
            tracker.jsonl.path,
            turn.folder / SAMPLES.name,
            params.flat(runtime=True),
            print,
        )

        def judge(module: nn.Module) -> Mapping[str, float]:
            turn.check()
            evaluation = validation(module, by_size=False)
            hinting.event(CLASS_SCORES, **class_scores(evaluation.result.per_class))
            return evaluation.metrics("val/")

        result = fit(
            model,
            validation.criterion,
            loader,
            judge,
            params,
            device=device,
            tracker=hinting,
            say=print,
        )
        tracker.finish_log()
        _write_outputs(params, root, validation, result)
        run_id = keep(run, tracker)
    print(f"trained in {result.seconds:.0f} s; model/ is written; MLflow run {run_id or 'none'}")


def _loader(params: Params, root: Path, micro_batch: int) -> TrainLoader:
    return build_train_loader(
        params.data,
        prepared=root / paths.PREPARED,
        root=root,
        seed=params.seed,
        batch_size=params.training.batch_size,
        micro_batch=micro_batch,
        max_objects=params.model.num_queries,
        workers=params.runtime.workers,
        prefetch=params.runtime.prefetch,
        pin_memory=params.runtime.pin_memory,
        say=print,
    )


def _write_outputs(params: Params, root: Path, validation: Validation, result: FitResult) -> None:
    """Write model/, plots/ and metrics/train.json."""
    sizes = Sizes(max(params.data.short_sides), params.data.long_side)
    save_model(root / paths.MODEL, result.best_state, params.model, validation.classes, sizes)
    write_plot_tables(root / TRAIN_LOG, root / paths.PLOTS)
    write_training_plots(root / TRAIN_LOG, root / paths.PLOTS)
    write_json(root / paths.METRICS / "train.json", _metrics(result))


def _metrics(result: FitResult) -> dict[str, Any]:
    """metrics/train.json: few numbers, since `dvc metrics show` prints them in one line."""
    return {
        "seconds": round(result.seconds, 1),
        "epochs": round(result.history[-1]["epoch"]),
        "best_epoch": result.best_epoch,
        "loss": result.history[-1]["train/epoch_loss"],
    }
