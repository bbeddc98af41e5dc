"""The processes of the train stage: rank 0 decides, starts the others and tells them what to do.

Started by `dvc repro`, rank 0 starts the others itself, if `runtime.processes` asks for some.
Under torchrun all are there from the start; those that are not 0 wait until it has decided.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from runkey.data.loader import TrainLoader, build_train_loader
from runkey.errors import Interrupted
from runkey.memory.choose import MemoryPlan
from runkey.model.build import build_model
from runkey.model.detr import Detector
from runkey.params import Params
from runkey.pipeline.parts import Validation, build_validation
from runkey.training.device import choose_device, choose_processes, set_up
from runkey.training.distributed import (
    LostRankError,
    SharedError,
    World,
    join_world,
    read_world,
)
from runkey.training.interrupts import Interrupts
from runkey.training.loop import fit
from runkey.training.ranks import Peers, launched_by_torchrun, started


@dataclass(frozen=True)
class Learner:
    """What every rank builds for itself."""

    model: Detector
    loader: TrainLoader
    validation: Validation


def count_ranks(params: Params, device: torch.device) -> int:
    """How many processes train together: as many as torchrun started, else as the parameters say.

    Raises:
        TrainingError: there are fewer GPUs than that.
    """
    if launched_by_torchrun():
        return read_world().size
    return choose_processes(params.runtime.processes, device, params.training.batch_size)


@contextmanager
def joined(params: Params, device: torch.device) -> Iterator[World]:
    """All ranks together, for rank 0; the others follow from when the block begins."""
    if launched_by_torchrun():
        with join_world(device) as world:
            yield world
        return
    size = count_ranks(params, device)
    again = [argument for argument in sys.argv[1:] if argument == "--traceback"]
    with (
        started(size, ["-m", "stages.train", *again]) as watch,
        join_world(device, watch) as world,
    ):
        yield world


def dismiss(params: Params) -> None:
    """Tell ranks that torchrun started that there is nothing to train."""
    device, _ = choose_device(params.runtime.device)
    with join_world(device) as world:
        world.share(None)


def follow(params: Params, root: Path, watch: Peers | None) -> None:
    """Train along with rank 0, which prints, logs and writes.

    What ends all ranks is said by rank 0, if it lives.

    Args:
        params: as rank 0 reads them.
        root: the workspace.
        watch: over rank 0, if it started this process.
    """
    try:
        with Interrupts() as interrupts:
            _follow(params, root, watch, interrupts)
    except SharedError:
        raise SystemExit(1) from None
    except LostRankError as error:
        if error.rank:
            raise SystemExit(1) from None
        raise
    except Interrupted as stop:
        raise SystemExit(stop.exit_code) from None


def _follow(params: Params, root: Path, watch: Peers | None, interrupts: Interrupts) -> None:
    device, _ = choose_device(params.runtime.device, read_world().local_rank)
    with join_world(device, watch) as world:
        plan: MemoryPlan | None = world.share(None)
        if plan is None:
            return
        learner = build_learner(params, root, plan, device, world)
        fit(
            learner.model,
            learner.validation.criterion,
            learner.loader,
            _judged_elsewhere,
            params,
            device=device,
            world=world,
            interrupts=interrupts,
            limit=plan.limit_pixels,
        )


def _judged_elsewhere(_: nn.Module) -> Mapping[str, float]:
    raise AssertionError("rank 0 evaluates")


def build_learner(
    params: Params, root: Path, plan: MemoryPlan, device: torch.device, world: World
) -> Learner:
    """Model (with random weights), data and validation of one rank."""
    set_up(
        params.seed,
        deterministic=params.training.deterministic,
        cpu_threads=params.training.cpu_threads,
        processes=world.size,
    )
    validation = build_validation(params, params.model, root, device)
    model = build_model(params.model, len(validation.classes))
    return Learner(model, _loader(params, root, plan, device, world), validation)


def _loader(
    params: Params, root: Path, plan: MemoryPlan, device: torch.device, world: World
) -> TrainLoader:
    # Each GPU has the memory that the plan was made for; on a CPU the ranks share it.
    shared_by = world.size if device.type == "cpu" else 1
    return build_train_loader(
        params,
        root,
        max(1, plan.micro_batch // shared_by),
        rank=world.rank,
        world_size=world.size,
    )
