"""The classification losses of the two presets, each with its matching cost.

Sums over predictions, not means: the criterion divides by the window's numbers.
Shapes: T predictions of all layers and images, R matched pairs, C logits (K classes, or K + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ClassificationLoss(Protocol):
    """A loss of logits, and the matching cost that goes with it."""

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Cost [N, L, Q] of logits [L, B, Q, C] for boxes with images [N] and labels [N]."""
        ...

    def loss(self, logits: Tensor, matched: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
        """Sum over predictions.

        Args:
            logits: [T, C].
            matched: int64 [R], matched predictions.
            labels: int64 [R], their true classes.
            iou: [R], their boxes' overlap with the true ones, detached.

        Returns:
            Scalar.
        """
        ...


@dataclass(frozen=True, slots=True)
class SoftmaxLoss:
    """DETR's weighted cross entropy; an unmatched query's class is no-object, the last one."""

    no_object: float
    """Weight of no-object."""
    num_classes: int
    """K, and the index of no-object."""

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Minus the probability of the true class."""
        log_sum = logits.logsumexp(-1).transpose(0, 1)[images]
        return -(logits[:, images, :, labels] - log_sum).exp()

    def loss(
        self,
        logits: Tensor,
        matched: Tensor,
        labels: Tensor,
        iou: Tensor,  # noqa: ARG002 - the other loss's
    ) -> Tensor:
        """See `ClassificationLoss.loss`; the overlap is not used."""
        classes = torch.full_like(logits[:, 0], self.num_classes, dtype=torch.int64)
        classes[matched] = labels
        weights = torch.ones_like(logits[0])
        weights[self.num_classes] = self.no_object
        return F.cross_entropy(logits, classes, weights, reduction="sum")


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """Binary cross entropy whose target at a matched query is its IoU.

    Elsewhere the target is 0 and the weight p^gamma, as in the matchability-aware loss of DEIM
    (Huang et al. 2025), so that scores tell how good a box is (IA-BCE, Cai et al. 2023).
    """

    gamma: float

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The focal matching cost of Deformable DETR, with alpha 0.25 and gamma 2."""
        picked = logits[:, images, :, labels]
        score = picked.sigmoid()
        matched = 0.25 * (1 - score).square() * -F.logsigmoid(picked)
        unmatched = 0.75 * score.square() * -F.logsigmoid(-picked)
        return matched - unmatched

    def loss(self, logits: Tensor, matched: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
        """See `ClassificationLoss.loss`."""
        weights = logits.detach().sigmoid() ** self.gamma
        weights[matched, labels] = 1.0
        quality = torch.zeros_like(weights)
        quality[matched, labels] = iou.to(weights.dtype)
        return F.binary_cross_entropy_with_logits(logits, quality, weights, reduction="sum")
