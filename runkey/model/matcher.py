"""Targets, model outputs, and the bipartite matching between them.

All decoder layers are matched together: only the costs between an image's own predictions and
boxes are computed, one transfer takes them to the host, another takes the assignment back.

Shapes: B images, N boxes of all images, L layers, Q queries, C logits, K classes, R pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from runkey.model.boxes import cxcywh_to_xyxy


@dataclass(frozen=True, slots=True)
class Targets:
    """The true boxes of a batch, concatenated over its images."""

    boxes_cxcywh: Tensor
    """float [N, 4], fractions of the image's width and height."""
    labels: Tensor
    """int64 [N], class indices 0..K-1."""
    counts: tuple[int, ...]
    """Boxes of each image; they sum to N. On the host, so that no device sync is needed."""

    def image_index(self) -> Tensor:
        """Return the image (0..B-1) of each box: int64 [N], on the host."""
        index = [image for image, count in enumerate(self.counts) for _ in range(count)]
        return torch.tensor(index, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Proposals:
    """Boxes of the encoder's best tokens (two-stage detection; preset fast)."""

    logits: Tensor
    """[B, Q, K]."""
    boxes_cxcywh: Tensor
    """[B, Q, 4] in 0..1."""


@dataclass(frozen=True, slots=True)
class DenoisingOutputs:
    """Predictions of the P denoising queries. `slots[i]` was made from target `targets[i]`."""

    logits: Tensor
    """[L, B, P, K]."""
    boxes_cxcywh: Tensor
    """[L, B, P, 4] in 0..1."""
    slots: Tensor
    """int64 [G * N] indices into the flattened B * P queries; the other queries are unused."""
    targets: Tensor
    """int64 [G * N] indices into the batch's N boxes."""
    groups: int
    """G: noised copies of each box."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a detector's forward pass returns; the last decoder layer is the prediction."""

    logits: Tensor
    """[L, B, Q, C], at least float32."""
    boxes_cxcywh: Tensor
    """[L, B, Q, 4] in 0..1, at least float32."""
    proposals: Proposals | None = None
    """Preset fast."""
    denoising: DenoisingOutputs | None = None
    """Preset fast with denoising groups, in training."""


# Replaces a cost that is not finite: larger than any real one, and sums of it stay finite.
_NEVER = 1e30

ClassCost = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [L, B, Q, C], image of each box [N], label of each box [N]) to cost [N, L, Q]."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Predictions of all layers to match, in full precision."""

    names: tuple[str, ...]
    """Name of each layer in messages."""
    logits: Tensor
    """[L, B, Q, C]."""
    boxes_cxcywh: Tensor
    """[L, B, Q, 4] in 0..1."""


@dataclass(frozen=True, slots=True)
class Matches:
    """Pairs of a prediction and a true box."""

    predictions: Tensor
    """int64 [R] indices into the flattened L * B * Q predictions."""
    targets: Tensor
    """int64 [R] indices into the N boxes."""
    fault: str = ""
    """Which predictions or boxes are not finite; empty if all costs are finite."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """Hungarian matching (Carion et al. 2020).

    cost = `classification` * class cost + `l1` * L1 distance - `giou` * generalised IoU
    """

    class_cost: ClassCost
    classification: float
    l1: float
    giou: float

    @torch.no_grad()
    def __call__(self, layers: Layers, targets: Targets) -> Matches:
        """Find the cheapest assignment of every layer and image.

        Returns:
            min(boxes, queries) pairs of each layer and image. If costs are not finite, there are
            pairs nevertheless, and `fault` names the layer and the image.
        """
        device = layers.logits.device
        images = targets.image_index().to(device, non_blocking=True)
        cost = self.read(self._costs(layers, targets, images))
        fault = ""
        if not np.isfinite(cost).all():
            fault = _first_non_finite(layers, targets)
            cost = np.nan_to_num(cost, nan=_NEVER, posinf=_NEVER, neginf=_NEVER)
        pairs = torch.tensor(_assign(cost, targets.counts)).to(device, non_blocking=True)
        return Matches(pairs[0], pairs[1], fault)

    def read(self, cost: Tensor) -> npt.NDArray[np.floating]:
        """Copy the costs [N, L, Q] to the host."""
        return cost.cpu().numpy()

    def _costs(self, layers: Layers, targets: Targets, images: Tensor) -> Tensor:
        """[N, L, Q]: the costs of each box and its own image's predictions.

        The coordinates are planes [N, L * Q] of their own: an innermost axis of 2 or 4 is slow.
        """
        true_cxcywh = targets.boxes_cxcywh.to(layers.boxes_cxcywh.dtype)
        true = _planes(true_cxcywh)[:, :, None]
        found = _planes(layers.boxes_cxcywh.transpose(0, 1)).flatten(2)[:, images]
        distance = (found[:4] - true[:4]).abs_().sum(0)
        cost = self.class_cost(layers.logits, images, targets.labels).flatten(1)
        cost = cost.mul(self.classification).add_(distance, alpha=self.l1)
        cost.sub_(_giou(found[4:], true[4:]), alpha=self.giou)
        return cost.view(-1, *layers.logits.shape[0:3:2])


def _planes(boxes_cxcywh: Tensor) -> Tensor:
    """Split boxes [..., 4] into planes [9, ...]: cxcywh, left, top, right, bottom, area."""
    boxes_xyxy = cxcywh_to_xyxy(boxes_cxcywh)
    width, height = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).unbind(-1)
    planes = *boxes_cxcywh.unbind(-1), *boxes_xyxy.unbind(-1), width * height
    return torch.stack(planes)


def _giou(found: Tensor, true: Tensor) -> Tensor:
    """Compute the generalised IoU [N, M] as `boxes.overlaps`, in fewer passes over memory.

    `found` [5, N, M] and `true` [5, N, 1] are planes: left, top, right, bottom, area.
    """
    high, low = torch.minimum(found[2:4], true[2:4]), torch.maximum(found[:2], true[:2])
    inner = _area(high.sub_(low))
    high, low = torch.maximum(found[2:4], true[2:4]), torch.minimum(found[:2], true[:2])
    hull = _area(high.sub_(low))
    union = (found[4] + true[4]).sub_(inner)
    gap = hull.sub(union).div_(hull)
    return inner.div_(union).sub_(gap)


def _area(sizes: Tensor) -> Tensor:
    """Multiply widths and heights [2, N, M], none below 0, in place."""
    width, height = sizes.clamp_(min=0).unbind()
    return width.mul_(height)


def _assign(cost: npt.NDArray[np.floating], counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """int64 [2, R]: flat prediction and target of each pair, by layer, then by image."""
    _, num_layers, queries = cost.shape
    # scipy computes in float64 on contiguous arrays; converted once, it copies none of them.
    cost = cost.transpose(1, 0, 2).astype(np.float64, order="C")
    pairs = np.empty((2, num_layers * sum(min(count, queries) for count in counts)), dtype=np.int64)
    start = 0
    for layer in range(num_layers):
        first = 0
        for image, count in enumerate(counts):
            if count:
                rows, columns = linear_sum_assignment(cost[layer, first : first + count])
                own = slice(start, start + len(rows))
                np.add(columns, (layer * len(counts) + image) * queries, out=pairs[0, own])
                np.add(rows, first, out=pairs[1, own])
                start += len(rows)
            first += count
    return pairs


def _first_non_finite(layers: Layers, targets: Targets) -> str:
    """Name the first that is not finite: targets, then layers in order."""
    if not targets.boxes_cxcywh.isfinite().all():
        return "the true boxes of this batch hold a number that is not finite"
    for layer, name in enumerate(layers.names):
        for what, values in (("logits", layers.logits), ("boxes", layers.boxes_cxcywh)):
            bad = (~values[layer].isfinite()).flatten(1).any(1).nonzero()
            if len(bad):
                return f"{what} of {name}, image {bad[0].item() + 1} of the batch, are not finite"
    return "the matching cost is not finite though predictions are; a true box has no area"
