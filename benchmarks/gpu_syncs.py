"""Host syncs of a training step, counted; a step whose gradient is not finite, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_common import CLASSES, SyntheticLoader, training_params
from runkey.data.dataset import GlobalBatch
from runkey.training.build import Replacements, build_training
from runkey.training.loop import fit
from runkey.training.step import train_step

R50 = {
    "preset": "detr",
    "backbone": "resnet50",
    "norm": "live",
    "hidden_dim": 256,
    "num_heads": 8,
    "feedforward_dim": 2048,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "num_queries": 100,
    "dropout": 0.1,
}


class SyncCounter:
    """Counts the calls of torch that wait for the device, and where they come from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.places: dict[str, int] = {}
        self.count = 0

    def __enter__(self) -> SyncCounter:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._take  # type: ignore[assignment]
        if self._device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self._catch.__exit__(None, None, None)

    def _take(self, message: object, _: object, file: str, line: int, *__: object) -> None:
        if "synchroniz" in str(message):
            self.count += 1
            place = f"{'/'.join(Path(file).parts[-3:])}:{line}"
            self.places[place] = self.places.get(place, 0) + 1


def check_syncs(device: torch.device) -> dict[str, Any]:
    """G4: syncs per training step in the whole loop, R50 at 800 x 1333, two images."""
    size, steps = ((800, 1333), 12) if device.type == "cuda" else ((96, 128), 5)
    params = training_params(R50, epochs=1, precision="bf16", ema_decay=0.999, batch_size=2)
    counts: list[int] = []
    with SyncCounter(device) as counter:

        class Counted(SyntheticLoader):
            def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
                """The same windows; what was counted until each is asked for."""
                for window in super().epoch(epoch, start_step):
                    counts.append(counter.count)
                    yield window

        loader = Counted(steps, 2, 2, size, pin=device.type == "cuda")
        context = build_training(params, CLASSES, device, replace=Replacements(loader=loader))
        fit(context, lambda _: {"val/loss": 1.0})
    each = [after - before for before, after in itertools.pairwise(counts)]
    # The first steps make optimizer state and handles.
    return {"check": "G4", "syncs_per_step": each, "most": max(each[3:]), "places": counter.places}


def check_skip(device: torch.device) -> dict[str, Any]:
    """G6: a gradient that is not finite leaves parameters and moments as they are, at no sync."""
    size = (800, 1333) if device.type == "cuda" else (96, 128)
    params = training_params(R50, epochs=1, precision="bf16", ema_decay=0.999, batch_size=2)
    loader = SyntheticLoader(8, 2, 2, size, pin=device.type == "cuda")
    parts = build_training(params, CLASSES, device, replace=Replacements(loader=loader)).step
    poison = torch.ones((), device=device)
    victim = next(p for p in parts.model.parameters() if p.requires_grad)
    victim.register_hook(lambda gradient: gradient * poison)
    syncs: dict[str, int] = {}
    skipped: dict[str, float] = {}
    same = {}
    for number, name in enumerate(("first", "second", "ordinary", "poisoned", "after")):
        poison.fill_(float("nan") if name == "poisoned" else 1.0)
        before = _bits(parts.model, parts.optimizer)
        with SyncCounter(device) as counter:
            result = train_step(parts, loader.window(number), 1.0)
        after = _bits(parts.model, parts.optimizer)
        syncs[name], skipped[name] = counter.count, float(result.skipped)
        same[name] = before == after
    return {"check": "G6", "syncs": syncs, "skipped": skipped, "nothing_changed": same}


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 of all weights, buffers, moments and step counters."""
    digest = hashlib.sha256()
    tensors: list[Tensor] = [*model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
