"""A training step and the losses: against the reference DETR and transformers, same weights.

Beside them stand the convolutions of runkey's step, and these with its matrix products: the same
calls on the same tensors, and nothing else. No step with these kernels is faster.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.gpu_common import make_batch
from benchmarks.reference import Reference
from benchmarks.speed.pairs import OURS, Row, check, relative, time_in_turn
from benchmarks.speed.peers import DETR, TRANSFORMERS, build_transformers
from runkey.data.dataset import Batch, normalise
from runkey.model.criterion import build_criterion
from runkey.model.matcher import Outputs, Targets
from runkey.params import Model, Params, load_params, override
from runkey.training.build import build_training
from runkey.training.step import accumulate_gradients, train_step

PRESET = Path(__file__).parents[2] / "presets" / "coco-detr-r50.yaml"
K = 91
CLIP, LR, BACKBONE_LR, DECAY = 0.1, 1e-4, 1e-5, 1e-4
"""Of the reference's `main.py`."""


def parameters(**changes: Any) -> Params:
    """DETR-R50 as its authors train it, without average and downloads."""
    common = {"model.backbone_weights": "none", "training.ema_decay": 0.0}
    return override(load_params(PRESET), common | changes)


def measure_steps(reference: Reference, rounds: int) -> Iterator[Row]:
    """Time whole steps of R50 on two images in 256 x 320 pixels, fp32."""
    for threads, padded in ((1, True), (2, True), (1, False)):
        torch.set_num_threads(threads)
        name = f"training step R50, 2 x 256x320, {threads} thread" + "s" * (threads > 1)
        row = _measure_step(reference, threads, padded, rounds, name)
        yield row
        gc.collect()


def _measure_step(reference: Reference, threads: int, padded: bool, rounds: int, name: str) -> Row:
    params = parameters(**{"training.batch_size": 2, "training.cpu_threads": threads})
    theirs, criterion = reference.build(params.model, dropout=params.model.dropout)
    parts = build_training(params, K, torch.device("cpu")).step
    parts.model.load_state_dict(theirs.state_dict())
    transformers = build_transformers(params.model, theirs.state_dict(), K)
    batch = make_batch(0, 2, (256, 320), padded=padded)
    images, padding = normalise(batch)
    labels = split_targets(batch)
    samples = reference.misc.NestedTensor(images, padding)

    def reference_loss() -> Tensor:
        losses = criterion(theirs(samples), labels)
        values = [losses[part] * weight for part, weight in criterion.weight_dict.items()]
        return torch.stack(values).sum()

    def transformers_loss() -> Tensor:
        boxes = [{"boxes": t["boxes"], "class_labels": t["labels"]} for t in labels]
        loss: Tensor = transformers(images, (~padding).long(), labels=boxes).loss
        return loss

    contestants = {
        OURS: lambda: train_step(parts, (batch,), 1.0),
        DETR: peer_step(theirs, reference_loss),
        TRANSFORMERS: peer_step(transformers, transformers_loss),
    }
    with Recorded() as recorded:
        train_step(parts, (batch,), 0.0)
    parts.model.load_state_dict(theirs.state_dict())
    contestants |= {
        "runkey's convolutions alone": lambda: recorded.replay(CONVOLUTIONS),
        "these and its matrix products": lambda: recorded.replay(CONVOLUTIONS | PRODUCTS),
    }
    # Without dropout, which draws other numbers in each.
    for model in (parts.model, theirs, transformers):
        model.eval()
    ours = float(accumulate_gradients(parts, (batch,)).values["loss"])
    found = {DETR: reference_loss().item(), TRANSFORMERS: transformers_loss().item()}
    agreement = check(name, {peer: relative(loss, ours) for peer, loss in found.items()}, 1e-4)
    for model in (parts.model, theirs, transformers):
        model.train()
    suffix = "" if padded else ", nothing padded"
    return Row(
        name + suffix, time_in_turn(contestants, rounds, warm_up=2), (DETR, TRANSFORMERS), agreement
    )


_ATEN = torch.ops.aten
CONVOLUTIONS = {_ATEN.convolution.default, _ATEN.convolution_backward.default}
PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default}


class Recorded(TorchDispatchMode):
    """Keeps the calls of torch's convolutions and matrix products, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the call if it is one of these, and run it."""
        if func in CONVOLUTIONS | PRODUCTS:
            kept = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
            self._calls.append((func, kept, kwargs or {}))
        return func(*args, **kwargs or {})

    def replay(self, wanted: set[Any]) -> None:
        """Repeat the calls of some operators; the results are freed at once."""
        for func, args, kwargs in self._calls:
            if func in wanted:
                func(*args, **kwargs)


def peer_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A step as in the reference's `train_one_epoch`, with its optimizer."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "backbone" not in name]},
        {"params": [p for name, p in trained if "backbone" in name], "lr": BACKBONE_LR},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)

    def step() -> None:
        # What runkey asks torch for is not asked of the peers.
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        value = loss()
        if not value.isfinite():
            raise ValueError("the peer's loss is not finite")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        torch.use_deterministic_algorithms(deterministic)

    return step


def split_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """Boxes and labels an image, as the reference takes them."""
    boxes, labels = (x.split(batch.counts) for x in (batch.boxes_cxcywh, batch.labels))
    return [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]


def measure_losses(reference: Reference, rounds: int) -> Iterator[Row]:
    """Time matching, losses and their gradients, on made-up outputs of six layers."""
    torch.set_num_threads(1)
    model = parameters().model
    theirs = reference.build(model)[1]
    for images, boxes in product((2, 16), (8, 40)):
        yield _measure_losses(model, theirs, images, boxes, rounds)


def _measure_losses(model: Model, theirs: nn.Module, images: int, boxes: int, rounds: int) -> Row:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, images, model.num_queries, K + 1, generator=rng).requires_grad_()
    predicted = torch.rand(6, images, model.num_queries, 4, generator=rng) * 0.4 + 0.3
    predicted.requires_grad_()
    true = torch.rand(images * boxes, 4, generator=rng) * 0.4 + 0.3
    labels = torch.randint(0, K, (images * boxes,), generator=rng)
    targets = Targets(true, labels, (boxes,) * images)
    pairs = zip(true.split(boxes), labels.split(boxes), strict=True)
    each = [{"boxes": box, "labels": label} for box, label in pairs]
    criterion = build_criterion(model, K)
    normaliser = criterion.normaliser(targets.counts)

    def ours() -> float:
        total = criterion(Outputs(logits, predicted), targets, normaliser).total
        total.backward()
        return total.item()

    def reference_losses() -> float:
        layers = [
            {"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, predicted, strict=True)
        ]
        found = theirs({**layers[-1], "aux_outputs": layers[:-1]}, each)
        total = sum(found[part] * weight for part, weight in theirs.weight_dict.items())
        total.backward()
        return total.item()

    name = f"matching and losses, batch {images}, {boxes} boxes an image"
    agreement = check(name, {DETR: relative(reference_losses(), ours())}, 1e-4)
    contestants = {OURS: ours, DETR: reference_losses}
    return Row(name, time_in_turn(contestants, rounds, warm_up=2), (DETR,), agreement)
