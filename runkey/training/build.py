"""What one training needs, built from its parameters, with the choices made said aloud."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from runkey.data.dataset import GlobalBatch
from runkey.errors import TrainingError
from runkey.model.criterion import Criterion
from runkey.params import Params
from runkey.training.checkpoint.file import Checkpoints, Stateful
from runkey.training.device import build_precision, choose_precision, set_up
from runkey.training.distributed import SharedCheckpoints, World
from runkey.training.interrupts import Interrupts
from runkey.training.metrics import Contained, Quiet, Tracker
from runkey.training.optimizer import Clipper, Ema, build_optimizer, trained_parameters
from runkey.training.schedule import Schedule, build_schedule
from runkey.training.state import host_weights
from runkey.training.step import TrainStep


class Loader(Protocol):
    """Training data: windows of micro-batches, the same for the same epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Windows in an epoch."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        """The windows of an epoch (from 0), from its `start_step`-th on."""
        ...


# Metrics by name (`val/AP`, ...) of a module in evaluation mode; called without gradients.
Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Setup:
    """What stays the same throughout a training."""

    params: Params
    machinery: TrainStep
    schedule: Schedule
    ema: Ema | None
    loader: Loader
    evaluate: Evaluate
    tracker: Tracker
    say: Callable[[str], None]
    world: World
    checkpoints: Checkpoints | None
    """None: nothing is saved."""
    interrupts: Interrupts
    precision_reason: str
    """Why this precision, in a few words."""

    @property
    def parts(self) -> dict[str, Stateful]:
        """What has tensors that change as training goes on, by name; saved in checkpoints."""
        machinery = self.machinery
        maybe: dict[str, Stateful | None] = {
            "model": machinery.model,
            "optimizer": machinery.optimizer,
            "ema": self.ema,
            "scaler": machinery.precision.scaler,
            "clipper": machinery.clipper,
        }
        return {name: part for name, part in maybe.items() if part is not None}

    @property
    def evaluated_module(self) -> nn.Module:
        """What is evaluated and kept: the moving average if there is one."""
        return self.machinery.model if self.ema is None else self.ema.module

    @property
    def watched(self) -> str:
        """Name of the metric that early stopping, plateau and the best weights go by."""
        return self.params.training.early_stopping.metric

    def seconds_left(self, step: int, seconds: float) -> float:
        """Time that the remaining steps take if they are like the first `step`."""
        return seconds / step * (self.schedule.total_steps - step)


def build_setup(
    model: nn.Module,
    criterion: Criterion,
    loader: Loader,
    evaluate: Evaluate,
    params: Params,
    *,
    device: torch.device,
    tracker: Tracker,
    say: Callable[[str], None],
    world: World,
    checkpoints: Checkpoints | None = None,
    interrupts: Interrupts | None = None,
) -> Setup:
    """Seed torch, move the model, and build what the steps need.  See `loop.fit`."""
    training = params.training
    if loader.steps_per_epoch == 0:
        raise TrainingError("prepared/train.json: no training images; see prepared/report.json")
    if world.size > training.batch_size:
        raise TrainingError(
            f"{world.size} processes share training.batch_size = {training.batch_size} images of"
            " a step: some have none; lower runtime.processes"
        )
    if world.size > 1:
        checkpoints = SharedCheckpoints(checkpoints if world.is_main else None, world)
    if not world.is_main:
        tracker, say = Quiet(), _say_nothing
    set_up(
        params.seed,
        deterministic=training.deterministic,
        cpu_threads=training.cpu_threads,
        processes=world.size,
    )
    machinery, precision_reason = _build_machinery(model, criterion, params, device, world)
    return Setup(
        params=params,
        machinery=machinery,
        schedule=build_schedule(
            params.schedule,
            epochs=training.epochs,
            steps_per_epoch=loader.steps_per_epoch,
            mode=training.early_stopping.mode,
        ),
        ema=Ema(machinery.model, training.ema_decay) if training.ema_decay > 0 else None,
        loader=loader,
        evaluate=evaluate,
        tracker=Contained(tracker, say),
        say=say,
        world=world,
        checkpoints=checkpoints,
        interrupts=interrupts or Interrupts(),
        precision_reason=precision_reason,
    )


def _say_nothing(_: str) -> None:
    """Rank 0 says it."""


def _build_machinery(
    model: nn.Module, criterion: Criterion, params: Params, device: torch.device, world: World
) -> tuple[TrainStep, str]:
    """The step's parts on the device, and why its precision was chosen."""
    channels_last = params.training.channels_last
    model = model.to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype, reason = choose_precision(params.training.precision, device)
    machinery = TrainStep(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(model, params.optimizer, params.lr),
        precision=build_precision(dtype, device),
        channels_last=channels_last,
        clipper=Clipper(params.optimizer.clip, device),
        world=world,
    )
    if world.size > 1:  # whatever made them: ranks that begin unlike stay unlike
        model.load_state_dict(world.share(host_weights(model) if world.is_main else {}))
    return machinery, reason


def announce(setup: Setup) -> dict[str, object]:
    """Print what was decided for the user; the same by name, for the log."""
    machinery, total = setup.machinery, setup.schedule.total_steps
    stopping = setup.params.training.early_stopping
    dtype = machinery.precision.dtype
    precision = "fp32" if dtype is None else f"{dtype} autocast".removeprefix("torch.")
    trained = sum(p.numel() for p in trained_parameters(machinery.optimizer))
    everything = sum(p.numel() for p in machinery.model.parameters())
    setup.say(f"precision: {precision} ({setup.precision_reason})")
    setup.say(
        f"training {trained:,} of {everything:,} parameters: "
        f"{setup.params.training.epochs} epochs of {setup.loader.steps_per_epoch} steps"
    )
    return {
        "device": str(machinery.device),
        "precision": precision,
        "precision_reason": setup.precision_reason,
        "trained_parameters": trained,
        "parameters": everything,
        "total_steps": total,
        "patience": stopping.patience if stopping.enabled else None,
        "threads": torch.get_num_threads(),
    }
