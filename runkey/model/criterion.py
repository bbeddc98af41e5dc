"""The training loss: match, then classification, L1 and generalised IoU of all layers at once.

Losses are sums divided by numbers of the whole window (an optimizer step's images), so that adding
up micro-batches gives the window's loss, however it is cut.

Shapes: B images, N boxes of all images, R matched pairs, T predictions of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from runkey import params
from runkey.model.boxes import cxcywh_to_xyxy, full_precision, overlaps
from runkey.model.matcher import DenoisingOutputs, Layers, Matcher, Matches, Outputs, Targets

# The classification losses of the two presets, each with its matching cost.


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


@dataclass(frozen=True, slots=True)
class Normaliser:
    """What a window's sums of losses are divided by.  Known before anything is computed."""

    boxes: float
    """True boxes of the window, at least 1; divides L1 and GIoU losses."""
    classification: float
    """Divides classification losses: class weights of a layer's queries (detr), boxes (fast)."""


@dataclass(frozen=True, slots=True)
class Losses:
    """A micro-batch's share of the window's loss."""

    total: Tensor
    """Scalar with a gradient: the sum of `parts`."""
    parts: dict[str, Tensor]
    """Detached scalars on the device, weighted and over all layers: classification, l1, giou, and
    denoising where there is any."""
    fault: str = ""
    """What the matching found that is not finite; the total is NaN then."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """Loss of a detector's outputs.  Made by `build_criterion`; it has no parameters."""

    classification_loss: ClassificationLoss
    matcher: Matcher
    classification: float
    l1: float
    giou: float
    no_object: float | None
    """Weight of an unmatched query in the softmax loss; None: that loss counts boxes only."""
    num_queries: int

    def normaliser(self, counts: Sequence[int]) -> Normaliser:
        """The window's numbers.

        Args:
            counts: true boxes of each image of the whole window: all micro-batches (and ranks).

        Returns:
            Divisors for `__call__`.
        """
        boxes = float(max(sum(counts), 1))
        if self.no_object is None:
            return Normaliser(boxes, boxes)
        matched = sum(min(count, self.num_queries) for count in counts)
        unmatched = self.num_queries * len(counts) - matched
        return Normaliser(boxes, matched + self.no_object * unmatched)

    def __call__(self, outputs: Outputs, targets: Targets, normaliser: Normaliser) -> Losses:
        """Match and compute the losses.

        Args:
            outputs: the model's answer, computed under autocast or not.
            targets: the micro-batch's true boxes.
            normaliser: of the whole window.

        Returns:
            The micro-batch's share of the window's loss; NaN if a matching cost is not finite.
        """
        return self.losses(outputs, targets, self.match(outputs, targets), normaliser)

    def match(self, outputs: Outputs, targets: Targets) -> Matches:
        """The assignment of all layers: the only step that needs values on the host."""
        return self.matcher(_layers(outputs), targets)

    def losses(
        self, outputs: Outputs, targets: Targets, matches: Matches, normaliser: Normaliser
    ) -> Losses:
        """The losses of a given assignment; no value is looked at, so fake tensors will do."""
        layers = _layers(outputs)
        logits, boxes = layers.logits.flatten(0, 2), layers.boxes_cxcywh.flatten(0, 2)
        with torch.autocast(logits.device.type, enabled=False):
            parts = self._parts(logits, boxes, matches, targets, normaliser)
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
        matched = boxes_cxcywh[matches.predictions]
        true = targets.boxes_cxcywh[matches.targets].to(matched.dtype)
        iou, giou = overlaps(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(true))
        labels = targets.labels[matches.targets]
        classification = self.classification_loss.loss(
            logits, matches.predictions, labels, iou.detach()
        )
        return {
            "classification": classification * (self.classification / normaliser.classification),
            "l1": (matched - true).abs().sum() * (self.l1 / normaliser.boxes),
            "giou": (1 - giou).sum() * (self.giou / normaliser.boxes),
        }

    def _denoising(
        self, outputs: DenoisingOutputs, targets: Targets, normaliser: Normaliser
    ) -> Tensor:
        """The same losses for queries whose target is known, averaged over the groups."""
        layers, pairs = len(outputs.logits), len(outputs.slots)
        logits = full_precision(outputs.logits).flatten(1, 2)[:, outputs.slots].flatten(0, 1)
        boxes = full_precision(outputs.boxes_cxcywh).flatten(1, 2)[:, outputs.slots].flatten(0, 1)
        everyone = torch.arange(layers * pairs, device=logits.device)
        matches = Matches(everyone, outputs.targets.repeat(layers))
        parts = self._parts(logits, boxes, matches, targets, normaliser)
        return torch.stack(list(parts.values())).sum() / outputs.groups


def build_criterion(model: params.Model, num_classes: int) -> Criterion:
    """The criterion of a preset.

    Args:
        model: section `model` of params.yaml.
        num_classes: K; logit K of preset detr is no-object.

    Returns:
        A criterion for `build_model(model, num_classes)`.
    """
    loss, is_softmax = model.loss, model.preset == "detr"
    kind: ClassificationLoss = (
        SoftmaxLoss(loss.no_object, num_classes) if is_softmax else QualityLoss(loss.focal_gamma)
    )
    return Criterion(
        classification_loss=kind,
        matcher=Matcher(kind.cost, loss.classification, loss.l1, loss.giou),
        classification=loss.classification,
        l1=loss.l1,
        giou=loss.giou,
        no_object=loss.no_object if is_softmax else None,
        num_queries=model.num_queries,
    )


def _layers(outputs: Outputs) -> Layers:
    """The encoder's proposals, where there are any, and the decoder's layers."""
    logits, boxes = full_precision(outputs.logits), full_precision(outputs.boxes_cxcywh)
    names = [f"decoder layer {number + 1}" for number in range(len(logits))]
    proposals = outputs.proposals
    if proposals is not None:
        names.insert(0, "the encoder's proposals")
        logits = torch.cat((full_precision(proposals.logits)[None], logits))
        boxes = torch.cat((full_precision(proposals.boxes_cxcywh)[None], boxes))
    return Layers(tuple(names), logits, boxes)
