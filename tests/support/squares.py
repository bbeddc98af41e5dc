"""Images of coloured squares, and the project's own small detector to train on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runkey import params
from runkey.data.dataset import Batch, GlobalBatch, normalise
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.matcher import Targets
from runkey.training.checkpoint import FolderCheckpoints, Interval
from runkey.training.device import configure_torch
from runkey.training.state import LoopState
from tests.support.fitting import fit

CLASSES = 3
QUERIES = 4
SIZE = 16
CPU = torch.device("cpu")


def make_batch(
    image_ids: Sequence[int], dtype: torch.dtype = torch.float32, size: int = SIZE
) -> Batch:
    """Images drawn from their ids alone; id 5k has no box."""
    images, boxes, labels, counts = [], [], [], []
    for image_id in image_ids:
        generator = torch.Generator().manual_seed(image_id)
        image = torch.randint(0, 60, (3, size, size), generator=generator, dtype=torch.uint8)
        count = 0 if image_id % 5 == 0 else 1 + image_id % QUERIES
        for _ in range(count):
            x, y = torch.randint(0, size - 6, (2,), generator=generator).tolist()
            label = int(torch.randint(0, CLASSES, (1,), generator=generator))
            image[label, y : y + 6, x : x + 6] = 220
            boxes.append([(x + 3) / size, (y + 3) / size, 6 / size, 6 / size])
            labels.append(label)
        images.append(image)
        counts.append(count)
    sizes = torch.full((len(images), 2), size)
    return Batch(
        images=torch.stack(images),
        sizes=sizes,
        boxes_cxcywh=torch.tensor(boxes, dtype=dtype).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        counts=tuple(counts),
        image_ids=tuple(image_ids),
        original_sizes=sizes,
    )


def make_window(image_ids: Sequence[int], micro_batch: int, **options) -> GlobalBatch:
    parts = [image_ids[i : i + micro_batch] for i in range(0, len(image_ids), micro_batch)]
    return tuple(make_batch(part, **options) for part in parts)


class SquaresLoader:
    """`images` images in windows of `batch_size`, the last one partial; the order by epoch."""

    def __init__(
        self,
        images: int = 20,
        batch_size: int = 8,
        micro_batch: int = 4,
        change: Callable[[int, GlobalBatch], GlobalBatch] = lambda _, window: window,
    ) -> None:
        """Args: change: makes another window of that of a step (from 1)."""
        self.images, self.batch_size, self.micro_batch = images, batch_size, micro_batch
        self.change = change

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        generator = torch.Generator().manual_seed(epoch)
        order = (torch.randperm(self.images, generator=generator) + 1).tolist()
        for step in range(start_step, self.steps_per_epoch):
            ids = order[step * self.batch_size : (step + 1) * self.batch_size]
            number = epoch * self.steps_per_epoch + step + 1
            yield self.change(number, make_window(ids, self.micro_batch, size=32))


def detector_params(lr: float = 1e-3, **sections: Any) -> params.Params:
    """Of a small detector with everything that has state: average, live norm, dropout."""
    training = {
        "epochs": 8,
        "evaluate_every": 4,
        "ema_decay": 0.9,
        # As many in a process that other tests have run in as in a fresh one: bits depend on it.
        "cpu_threads": 1,
        "early_stopping": {"metric": "val/loss", "mode": "min", "enabled": False},
    } | sections.pop("training", {})
    model = {
        "hidden_dim": 32,
        "num_heads": 2,
        "feedforward_dim": 64,
        "num_queries": 8,
        "dropout": 0.1,
        "encoder_layers": 1,
        "decoder_layers": 2,
    } | sections.pop("model", {})
    runtime = {"progress": False, "log_every": 1}
    rest = {"training": training, "model": model, "runtime": runtime, **sections}
    return params.parse_params({"lr": lr, "seed": 0, **rest})


def make_detector(parameters: params.Params) -> nn.Module:
    """Its model, freshly initialised."""
    configure_torch(parameters.seed, deterministic=True)
    return build_model(parameters.model, CLASSES)


def held_out_loss(parameters: params.Params) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation: the loss of images that are not trained on."""
    criterion = build_criterion(parameters.model, CLASSES)

    def evaluate(module: nn.Module) -> dict[str, float]:
        batch = make_batch(range(101, 109), size=32)
        targets = Targets(batch.boxes_cxcywh, batch.labels, batch.counts)
        losses = criterion(module(*normalise(batch)), targets, criterion.normaliser(batch.counts))
        return {"val/loss": float(losses.total)}

    return evaluate


def folder_checkpoints(folder: Path, seconds: float = 1e6) -> FolderCheckpoints:
    """Checkpoints on disk; only anchors and the last one, unless `seconds` is small."""
    fingerprint = {"key": "rk2-test", "micro_batch": 4, "world_size": 1} | {
        "device": "cpu",
        "precision": "off",
    }
    folder.mkdir(parents=True, exist_ok=True)
    return FolderCheckpoints(folder, fingerprint, interval=Interval(seconds))


def train_detector(
    parameters: params.Params,
    *,
    model: nn.Module | None = None,
    loader: SquaresLoader | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    folder: Path | None = None,
    seconds: float = 1e6,
    **options: Any,
) -> LoopState:
    """Train it; `evaluate`: not by the held-out loss; `folder`: with checkpoints there."""
    model = model or make_detector(parameters)
    checkpoints = folder_checkpoints(folder, seconds) if folder else None
    try:
        return fit(
            model,
            build_criterion(parameters.model, CLASSES),
            loader or SquaresLoader(),
            evaluate or held_out_loss(parameters),
            parameters,
            checkpoints=checkpoints,
            **options,
        )
    finally:
        if checkpoints:
            checkpoints.finish()
