"""What one rank of a test does: python -m tests.support.ranks SCENARIO OUT [ARGUMENT...]

Calls a function of this file with the joined world and the arguments; what it returns is saved to
OUT with the rank in place of `%`.  Torchrun's variables say which rank it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from runkey import params
from runkey.errors import report_errors
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.training import rank_monitor
from runkey.training.device import Precision
from runkey.training.distributed import World, join_world
from runkey.training.optimizer import Clipper, build_optimizer
from runkey.training.step import TrainStep, accumulate_gradients
from tests.support.rank_trainings import endure, train  # noqa: F401  scenarios
from tests.support.toy import ToyCriterion, ToyModel, make_window

CPU = torch.device("cpu")
PRESETS = ("fast", "detr")
WINDOWS = {
    "whole": [1, 2, 3, 7, 5, 4, 6, 8],  # image 5 is empty; 1 to 4 boxes in the others
    "partial": [11, 15, 12, 13, 14],
    "all empty": [5, 10],
    "fewer than ranks": [7],
}


class InFloat64(nn.Module):
    """The real detector in fp64; normalised images come in fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, images: Any, padding_mask: Any, targets: Any) -> Any:
        return self.model(images.double(), padding_mask, targets)


def machinery(model: nn.Module, criterion: Any, world: World) -> TrainStep:
    return TrainStep(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(model, params.Optimizer(), 1e-2),
        precision=Precision(CPU),
        channels_last=False,
        clipper=Clipper("none", 1.0, CPU),
        world=world,
    )


def real(preset: str, world: World) -> TrainStep:
    """A small real detector in fp64, with norms that do not follow the data."""
    section = params.Model(
        preset=preset,  # type: ignore[arg-type]
        hidden_dim=16,
        num_heads=2,
        feedforward_dim=16,
        decoder_layers=2,
        num_queries=6,
        loss=params.schema.LossWeights(classification=1.0 if preset == "detr" else 2.0),
    )
    torch.manual_seed(0)
    model = InFloat64(build_model(section, 3)).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return machinery(model, build_criterion(section, 3), world)


def window_of(ids: list[int], micro_batch: int, world: World) -> Any:
    """This rank's share, dealt as the loader deals it."""
    ours = ids[world.rank :: world.size]
    return make_window(ours, micro_batch, dtype=torch.float64, size=32)


def gradients(world: World) -> dict[tuple[str, str, int], Any]:
    """Losses and gradients of every preset, window and micro-batch."""
    found = {}
    for preset in PRESETS:
        parts = real(preset, world)
        for name, ids in WINDOWS.items():
            for micro_batch in (8, 4, 2, 1):
                parts.optimizer.zero_grad()
                window = window_of(ids, micro_batch, world)
                losses = accumulate_gradients(parts, window).values
                named = parts.model.named_parameters()
                grads = {n: p.grad.clone() for n, p in named if p.requires_grad}
                found[preset, name, micro_batch] = (losses, grads)
    return found


def statistics(world: World, windows: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Batch norm's buffers after each window of images."""
    torch.manual_seed(0)
    parts = machinery(ToyModel().double().train(), ToyCriterion(), world)
    found = []
    for ids in windows:
        ours = ids[world.rank :: world.size]
        accumulate_gradients(parts, make_window(ours, 8, dtype=torch.float64))
        found.append({n: b.clone() for n, b in parts.model.named_buffers()})
    return found


def live_loss(world: World, shares: Sequence[list[int]]) -> float:
    """Loss of a step of the real model with live batch norm: a forward pass for each share.

    Several ranks take one share each.
    """
    parts = real("fast", world)
    parts.model.train()
    mine = shares if world.size == 1 else [shares[world.rank]]
    window = [b for ids in mine for b in make_window(ids, 8, dtype=torch.float64, size=32)]
    return accumulate_gradients(parts, tuple(window)).values["loss"].item()


def accumulation(world: World) -> tuple[Any, Any, float]:
    """All that tests/training/test_ranks_gradients.py looks at."""
    shares = [WINDOWS["whole"][rank :: world.size] for rank in range(world.size)]
    windows = ([1, 2, 3, 4], [7])
    return gradients(world), statistics(world, windows), live_loss(world, shares)


def scarce(world: World, mib: str) -> Any:
    """Memory runs out on rank 1; see tests/support/scarce.py, which needs this file."""
    from tests.support.scarce import on_rank_1

    return on_rank_1(world, mib)


def exchange(world: World, scenario: str, *arguments: str) -> Any:
    """Call a function of tests/support/exchange.py, which needs this file."""
    from tests.support import exchange as scenarios

    return getattr(scenarios, scenario)(world, *arguments)


def main(scenario: str, out: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    rank_monitor.SILENT_SECONDS = float(os.environ.get("SILENT_SECONDS", "20"))
    with join_world(CPU) as world:
        result = globals()[scenario](world, *arguments)
        torch.save(result, out.replace("%", str(world.rank)))


if __name__ == "__main__":
    with report_errors():
        main(*sys.argv[1:])
