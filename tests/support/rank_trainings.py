"""Trainings of the toy on several ranks, for tests.support.ranks: whole, killed, gone on with."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch
from runkey.errors import DataError
from runkey.registry.claims import FileClaims, newest
from runkey.registry.once import HeldClaim, Rhythm
from runkey.training.checkpoint import FolderCheckpoints, Interval
from runkey.training.device import configure_torch
from runkey.training.distributed import Interrupts, World
from tests.support.claims import KEY, a_claim
from tests.support.fitting import fit
from tests.support.toy import (
    MemoryTracker,
    ToyCriterion,
    ToyLoader,
    ToyModel,
    make_params,
    make_window,
    val_loss,
)

EPOCHS = int(os.environ.get("EPOCHS", "3"))
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "0"))
"""Added to each step."""
STEPS = 3 * EPOCHS


class SharedLoader(ToyLoader):
    """17 images in windows of 8: of the last one, rank 1 gets none.  Acts once, at a step."""

    def __init__(self, world: World, act: str, step: int) -> None:
        super().__init__(images=17, micro_batch=2)
        self.world, self.act, self.step = world, act, step

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        windows = super().epoch(epoch, start_step)
        for number, window in enumerate(windows, start=epoch * 3 + start_step + 1):
            time.sleep(STEP_SECONDS)
            ids = [image_id for batch in window for image_id in batch.image_ids]
            if number == self.step:
                self._act()
            mine = make_window(ids[self.world.rank :: self.world.size], self.micro_batch)
            poisoned = self.act == "poisoned" and number in (self.step, self.step + 1)
            yield tuple(map(_poisoned, mine)) if poisoned else mine

    def _act(self) -> None:
        if self.act == "unreadable":
            raise DataError("data/7.png: cannot be read")
        if self.act.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.act])


def _poisoned(batch: Batch) -> Batch:
    return replace(batch, boxes_cxcywh=batch.boxes_cxcywh * float("inf"))


class Deadly(ToyCriterion):
    """Ends its process in the middle of a step."""

    def __init__(self, deadly_call: int) -> None:
        self.left = deadly_call

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*arguments)


def _kill_in_backward(model: ToyModel, deadly_pass: int) -> None:
    """End this process in a backward pass (from 1), before its last gradient."""
    left = deadly_pass

    def count(_: Tensor) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    first = cast(nn.Conv2d, model.backbone[0])
    first.weight.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]


def without_clock(values: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in values.items() if "per_second" not in k and "wait" not in k}


def train(
    world: World, folder: str, act: str = "", rank: str = "-1", step: str = "0"
) -> dict[str, Any]:
    """Train; what is left at the end.

    Args:
        world: the ranks.
        folder: of the checkpoints, one after each step.
        act: what happens: nothing, `unreadable`, a signal's name, `killed in a step`, `killed in
            backward` (when a part of the gradients has been sent), or `poisoned` (the step and the
            one after it have a loss that is not finite; two are too many).
        rank: which rank it happens to.
        step: the step that it happens before or in, from 1.
    """
    training: dict[str, Any] = {"epochs": EPOCHS, "ema_decay": 0.9}
    if act == "poisoned":
        training["guard"] = {"max_skips": 2, "window_steps": 9, "anchor_steps": 2}
    params = make_params(training=training, lr=3e-3)
    mine = act if world.rank == int(rank) else ""
    configure_torch(0, deterministic=True)
    criterion = Deadly(2 * int(step)) if mine == "killed in a step" else ToyCriterion()
    fingerprint = {
        "key": "k",
        "micro_batch": 2,
        "world_size": world.size,
        "device": "cpu",
        "precision": "off",
    }
    Path(folder).mkdir(exist_ok=True)
    checkpoints = (
        FolderCheckpoints(Path(folder), fingerprint, interval=Interval(0))
        if world.is_main
        else None
    )
    tracker = MemoryTracker()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    model = ToyModel(dropout=0.3)
    if mine == "killed in backward":
        _kill_in_backward(model, 2 * int(step))
    with Interrupts() as interrupts:
        result = fit(
            model,
            criterion,  # type: ignore[arg-type]
            SharedLoader(world, mine, int(step)),
            _evaluate if world.is_main else _nobody_asks,
            params,
            tracker=tracker,
            world=world,
            checkpoints=checkpoints,
            interrupts=interrupts,
        )
    if checkpoints:
        checkpoints.finish()
    content = checkpoints.load() if checkpoints else None
    return {
        "best": result.best_weights,
        "history": [without_clock(values) for values in result.history],
        "logged": [(step, without_clock(values)) for step, values in tracker.logged],
        "parts": content.parts if content else {},
        "events": [kind for kind, _ in tracker.events],
    }


def endure(world: World, folder: str) -> None:
    """Train under a claim in `folder`, and write the weights, as the stage does."""
    root, held = Path(folder), None
    if world.is_main:
        claims = FileClaims(root / ".runkey/claims")
        last = newest(claims, KEY)
        claim = a_claim(last.generation + 1 if last else 1)
        assert claims.make(claim)
        held = HeldClaim(claims, claim, Rhythm())
    with held or nullcontext():
        result = train(world, str(root / "checkpoints"))
        if held:
            (root / "model").mkdir(exist_ok=True)
            save_file(result["best"], root / "model/weights.safetensors")
            held.finish()


def _evaluate(module: nn.Module) -> dict[str, float]:
    return val_loss(module)


def _nobody_asks(_: nn.Module) -> dict[str, float]:
    raise AssertionError("rank 0 evaluates")
