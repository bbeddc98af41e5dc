"""A small real detector task: coloured squares, a few convolutions, fixed matching.

The model and the criterion follow the contract of runkey.model's; the tests of the whole (real
model, real matching) are in test_real_model.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runkey import params
from runkey.data.dataset import normalise
from runkey.model.matcher import Targets
from runkey.training.device import configure_torch
from tests.support.fitting import fit
from tests.support.squares import CLASSES, QUERIES, SIZE, make_batch, make_window

CPU = torch.device("cpu")
PATIENT = {"enabled": False, "metric": "val/loss", "mode": "min"}


@dataclass(frozen=True)
class ToyOutputs:
    logits: Tensor
    boxes_cxcywh: Tensor


@dataclass(frozen=True)
class ToyNormaliser:
    boxes: float
    slots: float


@dataclass(frozen=True)
class ToyLosses:
    total: Tensor
    parts: dict[str, Tensor]
    fault: str = ""


class ToyModel(nn.Module):
    """Convolutions (a `backbone.`), then one linear head for QUERIES boxes."""

    def __init__(self, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8 * (SIZE // 4) ** 2, QUERIES * (CLASSES + 4))

    def forward(
        self, images: Tensor, padding_mask: Tensor | None, targets: object = None
    ) -> ToyOutputs:
        assert padding_mask is None or images.shape[0] == padding_mask.shape[0]
        features = self.backbone(images.to(self.head.weight.dtype)).flatten(1)
        out = self.head(self.dropout(features)).view(-1, QUERIES, CLASSES + 4)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return ToyOutputs(out[..., :CLASSES], out[..., CLASSES:].sigmoid())


class ToyCriterion:
    """Query i answers for the i-th box of its image; sums divided by the window's counts."""

    def normaliser(self, counts: Sequence[int]) -> ToyNormaliser:
        return ToyNormaliser(max(1, sum(counts)), len(counts) * QUERIES)

    def __call__(self, outputs, targets, normaliser) -> ToyLosses:
        image = targets.image_index()
        slot = torch.cat([torch.arange(count) for count in targets.counts])
        wanted = torch.zeros_like(outputs.logits)
        wanted[image, slot, targets.labels] = 1
        classification = nn.functional.binary_cross_entropy_with_logits(
            outputs.logits, wanted, reduction="sum"
        )
        l1 = (outputs.boxes_cxcywh[image, slot] - targets.boxes_cxcywh).abs().sum()
        classification, l1 = classification / normaliser.slots, l1 / normaliser.boxes
        total = 2 * classification + 5 * l1
        return ToyLosses(total, {"classification": classification.detach(), "l1": l1.detach()})


class ToyLoader:
    """`images` images in windows of `batch_size`, the last one partial; the order by epoch."""

    def __init__(self, images: int = 20, batch_size: int = 8, micro_batch: int = 8) -> None:
        self.images, self.batch_size, self.micro_batch = images, batch_size, micro_batch

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0):
        generator = torch.Generator().manual_seed(epoch)
        order = (torch.randperm(self.images, generator=generator) + 1).tolist()
        for step in range(start_step, self.steps_per_epoch):
            ids = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield make_window(ids, self.micro_batch)


class MemoryTracker:
    """Keeps what it is given; goes back to where a checkpoint was taken."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.events: list[tuple[str, dict[str, object]]] = []

    def log(self, values, step: int) -> None:
        self.logged.append((step, dict(values)))

    def event(self, kind: str, **fields) -> None:
        self.events.append((kind, fields))

    def position(self) -> dict[str, int | str]:
        return {"logged": len(self.logged), "events": len(self.events)}

    def resume(self, position) -> None:
        position = position or {"logged": 0, "events": 0}
        del self.logged[position["logged"] :]
        del self.events[position["events"] :]


class StoppedError(Exception):
    """The end of a process, as far as a test in one process goes."""


class SavedInMemory:
    """Checkpoints: keeps a copy of the newest content; ends training after `stop_after` of them."""

    def __init__(self, content=None, stop_after=None, due=True) -> None:
        self.content, self.stop_after, self.is_due, self.saved = content, stop_after, due, 0
        self.newest: int | None = None if content is None else content.step
        self.path = None

    def due(self) -> bool:
        return self.is_due

    def save(self, content, *, wait: bool = False, anchor: bool = False) -> None:
        self.content, self.saved = copy.deepcopy(content), self.saved + 1
        self.newest = content.step
        if self.saved == self.stop_after:
            raise StoppedError

    def load(self):
        return copy.deepcopy(self.content)

    def load_anchor(self, step: int):
        return None


def make_params(lr: float = 1e-2, seed: int = 0, **sections) -> params.Params:
    sections.setdefault("runtime", {})
    sections["runtime"] = {"progress": False, "log_every": 1} | sections["runtime"]
    sections.setdefault("training", {})
    sections["training"] = {
        "epochs": 3,
        "early_stopping": {"metric": "val/loss", "mode": "min"},
    } | sections["training"]
    return params.parse_params({"lr": lr, "seed": seed} | sections)


def val_loss(module: nn.Module) -> dict[str, float]:
    """The toy loss on images that are not trained on."""
    assert not module.training
    assert not torch.is_grad_enabled()
    batch = make_batch(range(101, 113))
    targets = Targets(batch.boxes_cxcywh, batch.labels, batch.counts)
    criterion = ToyCriterion()
    outputs = module(*normalise(batch), None)
    losses = criterion(outputs, targets, criterion.normaliser(batch.counts))
    return {"val/loss": float(losses.total), "val/AP": 0.5}


def run(parameters=None, *, model=None, loader=None, evaluate=None, **options):
    parameters = parameters or make_params()
    configure_torch(parameters.seed, deterministic=True)
    model = model or ToyModel()
    return fit(
        model,
        ToyCriterion(),
        loader or ToyLoader(),
        evaluate or val_loss,
        parameters,
        **options,
    )


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def seeded():
    torch.manual_seed(5)
    return ToyModel(norm=False)  # batch norm's statistics are a micro-batch's own
