"""Build everything a training needs from its parameters: the only place that composes it.

The train stage, `runkey debug-step`, the memory trace and the benchmarks all call `build_training`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from runkey import paths
from runkey.data.dataset import GlobalBatch, Normalisation
from runkey.data.index import read_classes
from runkey.data.loader import TrainLoader, build_train_loader
from runkey.errors import TrainingError
from runkey.model.backbones import spec_of
from runkey.model.criterion import Criterion, build_criterion
from runkey.model.detr import build_model
from runkey.model.weights import load_initial_weights
from runkey.params import Params, Runtime, Training
from runkey.training.device import allow_tf32, build_precision, configure_torch, keep_freed_memory
from runkey.training.distributed import World
from runkey.training.optimizer import Clipper, Ema, build_optimizer, trained_parameters
from runkey.training.schedule import Schedule, build_schedule
from runkey.training.step import TrainStep
from runkey.training.tensors import host_weights
from runkey.units import counted

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

logger = logging.getLogger(__name__)


class Loader(Protocol):
    """Training data: global batches, the same for the same epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        """Yield the global batches of an epoch (from 0), from its `start_step`-th on."""
        ...


# Metrics by name (`val/AP`, ...) of a module in evaluation mode; called without gradients.
Evaluate = Callable[[nn.Module], Mapping[str, float]]


class Tracker(Protocol):
    """Records metrics and events. Calls are cheap, buffered, and never raise."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name at an optimizer step."""

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened once: the device chosen, an early stop.

        What happens in a step has the field `step`.
        """

    def position(self) -> Mapping[str, int | str]:
        """Return where the log is, safe on disk up to there; for a checkpoint."""
        ...

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Continue where a checkpoint was taken; None: training starts from its beginning.

        What the log holds after that place will be logged again, equal in all but times, and must
        not be recorded twice.
        """


def safe_tracker(tracker: Tracker | None) -> Tracker:
    """Pass everything to a tracker, if there is one, until that raises; then to none.

    Trackers promise not to raise; a broken promise may cost the log, but not the training.
    """
    return cast("Tracker", _SafeTracker(tracker))


class _SafeTracker:
    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        if self._tracker is not None:
            try:
                return getattr(self._tracker, method)(*args, **options)
            except Exception as error:  # noqa: BLE001  whatever it is, training goes on
                self._tracker = None
                logger.info(f"tracking stopped, training goes on: {type(error).__name__}: {error}")
        return {}


@dataclass(frozen=True)
class TrainData:
    """The prepared data that a training reads."""

    root: Path
    """The workspace: prepared data, images and the file of initial weights."""
    class_names: Sequence[str]
    micro_batch: int
    """Most images of a forward pass."""

    @classmethod
    def read(cls, root: Path, micro_batch: int) -> TrainData:
        """Read the class names of a workspace's prepared data; DataError if there are none."""
        classes = read_classes(root / paths.PREPARED / "classes.json")
        return cls(root, [one.name for one in classes], micro_batch)


@dataclass(frozen=True)
class Replacements:
    """Parts that replace those of the parameters: in traces, benchmarks and tests."""

    model: nn.Module | None = None
    """In place of a freshly initialised one."""
    criterion: Criterion | None = None
    loader: Loader | None = None


@dataclass(frozen=True)
class TrainContext:
    """What stays the same throughout a training."""

    step: TrainStep
    schedule: Schedule
    ema: Ema | None
    loader: Loader
    seed: int
    settings: Training
    """Of the loop and of its guard."""
    runtime: Runtime

    @property
    def watched_metric(self) -> str:
        """Metric that decides on early stopping, plateau and the best weights."""
        return self.settings.early_stopping.metric

    @property
    def world(self) -> World:
        """The ranks that train together."""
        return self.step.world

    @property
    def parts(self) -> dict[str, Stateful]:
        """What has tensors that change during training, by name; saved in checkpoints."""
        maybe: dict[str, Stateful | None] = {
            "model": self.step.model,
            "optimizer": self.step.optimizer,
            "ema": self.ema,
            "scaler": self.step.precision.scaler,
            "clipper": self.step.clipper,
        }
        return {name: part for name, part in maybe.items() if part is not None}

    @property
    def evaluated_module(self) -> nn.Module:
        """The module to evaluate and keep: the moving average if there is one."""
        return self.step.model if self.ema is None else self.ema.module

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Load the state dicts of a checkpoint's parts; one without a loss scaler is of a CPU."""
        for name, part in self.parts.items():
            if name in parts or name != "scaler":
                part.load_state_dict(parts[name])


def build_training(
    params: Params,
    num_classes: int,
    device: torch.device,
    world: World | None = None,
    data: TrainData | None = None,
    replace: Replacements | None = None,
) -> TrainContext:
    """Seed torch and build model, criterion, optimizer, schedule, average and loader.

    `world` is this process among those that train together; None: it is the only one. Without
    `data` to train on, an epoch is one step without a batch, and weights are random.

    Raises:
        TrainingError: no data, nothing to train, or fewer images per step than ranks.
        DataError: the data set is not prepared.
        ModelError: the initial weights cannot be read.
    """
    world, replace, training = world or World(), replace or Replacements(), params.training
    if world.size > training.batch_size:
        raise TrainingError(
            f"{counted(world.size, 'process')} share training.batch_size ="
            f" {counted(training.batch_size, 'image')} of a step: some have none;"
            " lower runtime.processes"
        )
    if device.type == "cpu":
        keep_freed_memory()
    configure_torch(
        params.seed,
        deterministic=training.deterministic,
        cpu_threads=training.cpu_threads,
        processes=world.size,
    )
    detector = build_model(params.model, num_classes) if replace.model is None else None
    loader = replace.loader or (build_loader(params, data, device, world) if data else _NoData())
    if loader.steps_per_epoch == 0:
        raise TrainingError(
            "prepared/train.safetensors: no training images; see prepared/report.json"
        )
    if detector and data and world.is_main:
        loaded = load_initial_weights(detector, params.model, data.class_names, data.root)
        for line in loaded.lines():
            logger.info(line)
    criterion = replace.criterion or build_criterion(params.model, num_classes)
    model = detector or replace.model
    assert model is not None
    step = _build_step(params, model, criterion, device, world)
    return TrainContext(
        step=step,
        schedule=build_schedule(
            params.schedule,
            epochs=training.epochs,
            steps_per_epoch=loader.steps_per_epoch,
            mode=training.early_stopping.mode,
        ),
        ema=Ema(step.model, training.ema_decay) if training.ema_decay > 0 else None,
        loader=loader,
        seed=params.seed,
        settings=training,
        runtime=params.runtime,
    )


def _build_step(
    params: Params, model: nn.Module, criterion: Criterion, device: torch.device, world: World
) -> TrainStep:
    """Move the model to the device and build what trains it."""
    training, spec = params.training, spec_of(params.model.backbone)
    model = model.to(device)
    if training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = build_precision(training.precision, device)
    allow_tf32(precision.tf32)
    step = TrainStep(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(model, params.optimizer, params.lr),
        precision=precision,
        channels_last=training.channels_last,
        clipper=Clipper(device=device, **params.optimizer.clip.model_dump()),
        world=world,
        normalisation=Normalisation(spec.mean, spec.std),
        layer_drop=params.model.layer_drop,
    )
    if world.size > 1:  # ranks that start with different weights would stay different
        model.load_state_dict(world.broadcast(host_weights(model) if world.is_main else {}))
    return step


def build_loader(
    params: Params, data: TrainData, device: torch.device, world: World | None = None
) -> TrainLoader:
    """Build one rank's loader of the training split; DataError if that is not prepared or empty."""
    world = world or World()
    # GPUs each have the memory that the micro-batch fits; on a CPU the ranks share it.
    shared_by = world.size if device.type == "cpu" else 1
    micro_batch = max(1, data.micro_batch // shared_by)
    return build_train_loader(
        params, data.root, micro_batch, rank=world.rank, world_size=world.size
    )


class _NoData:
    """A loader without batches, where the steps' batches come from elsewhere."""

    steps_per_epoch = 1

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:  # noqa: ARG002
        return iter(())


def describe(context: TrainContext) -> dict[str, object]:
    """Log what was decided for the user; return the same by name, for the tracker."""
    step, settings = context.step, context.settings
    stopping = settings.early_stopping
    dtype, reason = step.precision.dtype, step.precision.reason
    precision = "TF32" if step.precision.tf32 else "fp32"
    if dtype is not None:
        precision = f"{dtype} autocast".removeprefix("torch.")
    trained = sum(p.numel() for p in trained_parameters(step.optimizer))
    everything = sum(p.numel() for p in step.model.parameters())
    logger.info(f"precision: {precision} ({reason})")
    logger.info(
        f"training {trained:,} of {everything:,} parameters: "
        f"{counted(settings.epochs, 'epoch')} of {counted(context.loader.steps_per_epoch, 'step')}"
    )
    return {
        "device": str(step.device),
        "precision": precision,
        "precision_reason": reason,
        "trained_parameters": trained,
        "parameters": everything,
        "total_steps": context.schedule.total_steps,
        "patience": stopping.patience if stopping.enabled else None,
        "threads": torch.get_num_threads(),
    }
