"""A training step by itself, as `fit` takes it: for memory, which knows no training.

Runs without mlflow, dvc and pycocotools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from runkey.data.dataset import GlobalBatch
from runkey.memory.trace.record import BuiltStep, StepFactory, with_fixed_matches
from runkey.model.build import build_model
from runkey.model.criterion import build_criterion
from runkey.params import Params
from runkey.training.build import build_setup
from runkey.training.distributed import World
from runkey.training.metrics import Quiet
from runkey.training.step import train_step


class _OneStep:
    """Stands for a loader where the windows come from elsewhere."""

    steps_per_epoch = 1

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:  # noqa: ARG002
        """No windows."""
        return iter(())


def build_step(
    params: Params, classes: int, device: torch.device, *, fixed_matches: bool = False
) -> BuiltStep:
    """A whole optimizer step of a fresh model.

    Args:
        params: model, optimizer and training are read.
        classes: K.
        device: where to train.
        fixed_matches: for fake tensors, whose values no matcher can see.
    """

    def nothing(_: nn.Module) -> Mapping[str, float]:
        return {}

    criterion = build_criterion(params.model, classes)
    setup = build_setup(
        build_model(params.model, classes),
        with_fixed_matches(criterion) if fixed_matches else criterion,
        _OneStep(),
        nothing,
        params,
        device=device,
        tracker=Quiet(),
        say=lambda _: None,
        world=World(),
    )

    def step(window: GlobalBatch) -> None:
        result = train_step(setup.machinery, window, 1.0)
        if setup.ema is not None:
            setup.ema.update(result.skipped)

    return BuiltStep(
        step,
        setup.machinery.model,
        setup.machinery.optimizer,
        None if setup.ema is None else setup.ema.module,
    )


def step_factory(params: Params, classes: int) -> StepFactory:
    """Builds the step on a device that is not there."""
    return lambda device: build_step(params, classes, device, fixed_matches=True)
