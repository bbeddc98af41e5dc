"""The training loss: matching, then classification, L1 and GIoU losses of all layers together.

Losses are sums divided by counts of the whole global batch (all images of an optimizer step), so
the losses of its micro-batches add up to its loss, however it is split.

Shapes: B images, N boxes of all images, R matched pairs, T predictions of all layers, L layers,
Q queries, C logits, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runkey import params
from runkey.model.boxes import cxcywh_to_xyxy, full_precision, overlaps
from runkey.model.matcher import DenoisingOutputs, Layers, Matcher, Matches, Outputs, Targets


@dataclass(frozen=True, slots=True)
class SoftmaxLoss:
    """DETR's weighted cross entropy (Carion et al. 2020); unmatched queries are no-object."""

    no_object: float
    """Weight of no-object."""
    num_classes: int
    """K, which is also the index of no-object."""

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the matching cost [N, L, Q]: minus the probability of the true class.

        Args:
            logits: [L, B, Q, C].
            images: int64 [N], image of each box.
            labels: int64 [N], class of each box.
        """
        return logits.softmax(-1)[:, images, :, labels].neg_()

    def loss(
        self,
        logits: Tensor,
        matched: Tensor,
        labels: Tensor,
        iou: Tensor,  # noqa: ARG002 - the other loss needs it
    ) -> Tensor:
        """Sum the cross entropy over all predictions.

        Args:
            logits: [T, C].
            matched: int64 [R], indices of the matched predictions.
            labels: int64 [R], their true classes.
            iou: [R], IoU of predicted and true boxes, detached; not used here.
        """
        classes = torch.full_like(logits[:, 0], self.num_classes, dtype=torch.int64)
        classes[matched] = labels
        weights = torch.ones_like(logits[0])
        weights[self.num_classes :].fill_(self.no_object)  # assigned to an index, a number syncs
        return F.cross_entropy(logits, classes, weights, reduction="sum")


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """Binary cross entropy whose target at a matched query is the IoU (IA-BCE, Cai et al. 2023).

    Elsewhere the target is 0 and the weight is p^gamma, as in the matchability-aware loss of DEIM
    (Huang et al. 2025). A score then predicts how well the box fits.
    """

    gamma: float

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the focal cost of Deformable DETR (Zhu et al. 2021), alpha 0.25, gamma 2.

        Arguments as for `SoftmaxLoss.cost`.
        """
        picked = logits[:, images, :, labels]
        score = picked.sigmoid()
        matched = 0.25 * (1 - score).square() * -F.logsigmoid(picked)
        unmatched = 0.75 * score.square() * -F.logsigmoid(-picked)
        return matched - unmatched

    def loss(self, logits: Tensor, matched: Tensor, labels: Tensor, iou: Tensor) -> Tensor:
        """Sum the weighted binary cross entropy; arguments as for `SoftmaxLoss.loss`."""
        weights = logits.detach().sigmoid() ** self.gamma
        weights[matched, labels] = weights.new_ones(())  # a plain number would sync
        quality = torch.zeros_like(weights)
        quality[matched, labels] = iou.to(weights.dtype)
        return F.binary_cross_entropy_with_logits(logits, quality, weights, reduction="sum")


@dataclass(frozen=True, slots=True)
class Normaliser:
    """The divisors of a global batch's summed losses, known before the forward pass."""

    boxes: float
    """True boxes of the global batch, at least 1; divides the L1 and GIoU losses."""
    classification: float
    """Divides classification losses: class weights of one layer's queries (detr), boxes (fast)."""


@dataclass(frozen=True, slots=True)
class Losses:
    """A micro-batch's part of the global batch's loss."""

    total: Tensor
    """Scalar with gradient: the sum of `parts`."""
    parts: dict[str, Tensor]
    """Detached scalars on the device, weighted and summed over layers: classification, l1, giou,
    and denoising if there are denoising queries."""
    fault: str = ""
    """What the matching found that is not finite; the total is NaN then."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """The loss of a detector's outputs, without parameters; `build_criterion` makes it."""

    classification_loss: SoftmaxLoss | QualityLoss
    matcher: Matcher
    """Its weights are those of the losses, too."""
    num_queries: int

    def normaliser(self, counts: Sequence[int]) -> Normaliser:
        """Compute a global batch's divisors from the boxes of each image, of all ranks."""
        boxes, loss = float(max(sum(counts), 1)), self.classification_loss
        if isinstance(loss, QualityLoss):
            return Normaliser(boxes, boxes)
        matched = sum(min(count, self.num_queries) for count in counts)
        unmatched = self.num_queries * len(counts) - matched
        return Normaliser(boxes, matched + loss.no_object * unmatched)

    def __call__(self, outputs: Outputs, targets: Targets, normaliser: Normaliser) -> Losses:
        """Match predictions to boxes and compute the losses, in full precision.

        Returns:
            The micro-batch's part of the loss; NaN if a matching cost is not finite.
        """
        # Only the matching reads values on the host.
        matches = self.matcher(_layers(outputs), targets)
        layers = _layers(outputs)
        logits, boxes_cxcywh = layers.logits.flatten(0, 2), layers.boxes_cxcywh.flatten(0, 2)
        with torch.autocast(logits.device.type, enabled=False):
            parts = self._parts(logits, boxes_cxcywh, matches, targets, normaliser)
            if outputs.denoising is not None:
                parts["denoising"] = self._denoising(outputs.denoising, targets, normaliser)
            total = torch.stack(list(parts.values())).sum()
            if matches.fault:
                # A prediction that is not finite may be in none of the pairs.
                total = total * math.nan
        detached = {name: part.detach() for name, part in parts.items()}
        return Losses(total, detached, matches.fault)

    def _parts(
        self,
        logits: Tensor,
        boxes_cxcywh: Tensor,
        matches: Matches,
        targets: Targets,
        normaliser: Normaliser,
    ) -> dict[str, Tensor]:
        """Weighted losses of flat predictions: logits [T, C], boxes [T, 4]."""
        matched_cxcywh = boxes_cxcywh[matches.predictions]
        true_cxcywh = targets.boxes_cxcywh[matches.targets].to(matched_cxcywh.dtype)
        iou, giou = overlaps(cxcywh_to_xyxy(matched_cxcywh), cxcywh_to_xyxy(true_cxcywh))
        labels, weights = targets.labels[matches.targets], self.matcher
        classification = self.classification_loss.loss(
            logits, matches.predictions, labels, iou.detach()
        )
        return {
            "classification": classification * (weights.classification / normaliser.classification),
            "l1": (matched_cxcywh - true_cxcywh).abs().sum() * (weights.l1 / normaliser.boxes),
            "giou": (1 - giou).sum() * (weights.giou / normaliser.boxes),
        }

    def _denoising(
        self, outputs: DenoisingOutputs, targets: Targets, normaliser: Normaliser
    ) -> Tensor:
        """The same losses for queries whose target is known, averaged over the groups."""
        layers, pairs = len(outputs.logits), len(outputs.slots)
        logits, boxes_cxcywh = (
            full_precision(x).flatten(1, 2)[:, outputs.slots].flatten(0, 1)
            for x in (outputs.logits, outputs.boxes_cxcywh)
        )
        everyone = torch.arange(layers * pairs, device=logits.device)
        matches = Matches(everyone, outputs.targets.repeat(layers))
        parts = self._parts(logits, boxes_cxcywh, matches, targets, normaliser)
        return torch.stack(list(parts.values())).sum() / outputs.groups


def build_criterion(model: params.Model, num_classes: int) -> Criterion:
    """Build the criterion for `build_model(model, num_classes)`."""
    loss = model.loss
    classification_loss = (
        SoftmaxLoss(loss.no_object, num_classes)
        if model.preset == "detr"
        else QualityLoss(loss.focal_gamma)
    )
    matcher = Matcher(classification_loss.cost, loss.classification, loss.l1, loss.giou)
    return Criterion(classification_loss, matcher, model.num_queries)


def _layers(outputs: Outputs) -> Layers:
    """The encoder's proposals, if there are any, and the decoder's layers."""
    logits, boxes_cxcywh = full_precision(outputs.logits), full_precision(outputs.boxes_cxcywh)
    names = [f"decoder layer {index + 1}" for index in range(len(logits))]
    proposals = outputs.proposals
    if proposals is not None:
        names.insert(0, "the encoder's proposals")
        logits = torch.cat((full_precision(proposals.logits)[None], logits))
        boxes_cxcywh = torch.cat((full_precision(proposals.boxes_cxcywh)[None], boxes_cxcywh))
    return Layers(tuple(names), logits, boxes_cxcywh)
