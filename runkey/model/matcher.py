"""Bipartite matching of predictions and true boxes, of all decoder layers in one go.

Only the costs between an image's own predictions and boxes are computed, they travel to the host
in one transfer, and the assignments go back in another.

Shapes: B images, N boxes of all images, a set of predictions has L layers of Q queries per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from runkey.errors import TrainingError
from runkey.model.boxes import cxcywh_to_xyxy, full_precision, overlaps
from runkey.model.targets import Targets

# More than any real cost: padding is matched last.
_PADDING_COST = 1e6

ClassCost = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [L, B, Q, C], image of each box [N], label of each box [N]) to cost [N, L, Q]."""


@dataclass(frozen=True, slots=True)
class PredictionSet:
    """Predictions of one kind, to be matched layer by layer."""

    name: str
    """How messages call a layer of it."""
    logits: Tensor
    """[L, B, Q, C]."""
    boxes_cxcywh: Tensor
    """[L, B, Q, 4]."""
    padding: Tensor | None = None
    """bool [B, Q], True for predictions that should not be matched."""


@dataclass(frozen=True, slots=True)
class Matches:
    """Which prediction stands for which box, in one set."""

    predictions: Tensor
    """int64 [R] indices into the flattened L * B * Q predictions."""
    targets: Tensor
    """int64 [R] indices into the N boxes."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """Cheapest assignment (Carion et al. 2020): class cost, L1 and generalised IoU, weighted."""

    class_cost: ClassCost
    classification: float
    l1: float
    giou: float

    @torch.no_grad()
    def __call__(self, sets: Sequence[PredictionSet], targets: Targets) -> list[Matches]:
        """Match every layer of every set.

        Args:
            sets: predictions; their images are the targets'.
            targets: the true boxes.

        Returns:
            Matches per set: min(boxes, queries) of each image in each layer.

        Raises:
            TrainingError: a cost is not finite; the text names the layer and the image.
        """
        images = targets.image_index().to(targets.labels.device, non_blocking=True)
        on_device = [self._costs(s, targets, images) for s in sets]
        flat = torch.cat([cost.flatten() for cost in on_device]).cpu().numpy()
        if not np.isfinite(flat).all():
            raise TrainingError(_first_non_finite(sets, targets))
        assigned, start = [], 0
        for prediction_set, cost in zip(sets, on_device, strict=True):
            host = flat[start : start + cost.numel()].reshape(cost.shape)
            start += cost.numel()
            assigned.append(_assign(host, targets.counts, prediction_set.logits.shape[2]))
        sizes = [pairs.shape[1] for pairs in assigned]
        together = torch.from_numpy(np.concatenate(assigned, axis=1))
        together = together.to(targets.labels.device, non_blocking=True)
        return [Matches(*pairs) for pairs in torch.split(together, sizes, dim=1)]

    def _costs(self, predictions: PredictionSet, targets: Targets, images: Tensor) -> Tensor:
        """[N, L, Q]: the costs of a box against its own image's predictions."""
        logits = full_precision(predictions.logits)
        boxes = full_precision(predictions.boxes_cxcywh).transpose(0, 1)[images]
        true = targets.boxes_cxcywh.to(boxes.dtype)[:, None, None, :]
        distance = (boxes - true).abs().sum(-1)
        _, giou = overlaps(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(true))
        cost = self.classification * self.class_cost(logits, images, targets.labels)
        cost = cost + self.l1 * distance - self.giou * giou
        if predictions.padding is not None:
            cost = cost.masked_fill(predictions.padding[images][:, None, :], _PADDING_COST)
        return cost


def _assign(
    cost: npt.NDArray[np.floating], counts: Sequence[int], queries: int
) -> npt.NDArray[np.int64]:
    """int64 [2, R]: flat prediction and target of each pair, layer by layer, image by image."""
    batch = len(counts)
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for layer in range(cost.shape[1]):
        first = 0
        for image, count in enumerate(counts):
            if count:
                rows, columns = linear_sum_assignment(cost[first : first + count, layer])
                flat = (layer * batch + image) * queries + columns
                pairs.append(np.stack((flat, first + rows)))
            first += count
    return np.concatenate(pairs, axis=1)


def _first_non_finite(sets: Sequence[PredictionSet], targets: Targets) -> str:
    """Say what is not finite, first things first: targets, then layers in their order."""
    if not targets.boxes_cxcywh.isfinite().all():
        return "the true boxes of this batch hold a number that is not finite; run prepare again"
    for prediction_set in sets:
        for what, values in (
            ("logits", prediction_set.logits),
            ("boxes", prediction_set.boxes_cxcywh),
        ):
            bad = (~values.isfinite()).flatten(2).any(2).nonzero()
            if len(bad):
                layer, image = bad[0].tolist()
                number = f" {layer + 1}" if len(values) > 1 else ""
                where = prediction_set.name + number
                return (
                    f"{what} of {where}, image {image + 1} of the batch, are not finite;"
                    " lower lr, or set training.precision: off"
                )
    return "the matching cost is not finite though predictions are; a true box has no area"
