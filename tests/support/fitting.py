"""Train given parts, in place of those that the parameters describe."""

from __future__ import annotations

from typing import Any

import torch

from runkey.params import Params
from runkey.training import loop
from runkey.training.build import Replacements, TrainContext, build_training
from runkey.training.distributed import World
from runkey.training.state import LoopState

CPU = torch.device("cpu")


def build(
    model: Any, criterion: Any, loader: Any, parameters: Params, world: World | None = None
) -> TrainContext:
    """A training of a model on a loader's batches, on the CPU."""
    replace = Replacements(model, criterion, loader)
    return build_training(parameters, 3, CPU, world, replace=replace)


def fit(
    model: Any,
    criterion: Any,
    loader: Any,
    evaluate: Any,
    parameters: Params,
    *,
    world: World | None = None,
    **options: Any,
) -> LoopState:
    """Train it; options: those of `runkey.training.loop.fit`."""
    return loop.fit(build(model, criterion, loader, parameters, world), evaluate, **options)
