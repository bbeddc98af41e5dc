"""Convert model outputs to detections in the original image's pixels.

Shapes: B images, Q queries, K classes, n detections of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runkey import params
from runkey.model.boxes import cxcywh_to_xyxy, full_precision
from runkey.model.matcher import Outputs

# COCO's evaluation counts the best 100 detections of an image.
_MAX_DETECTIONS = 100


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections of one image, best first."""

    scores: Tensor
    """float [n] in 0..1."""
    labels: Tensor
    """int64 [n], class indices 0..K-1."""
    boxes_xyxy: Tensor
    """float [n, 4] in pixels of the original image, inside it."""


@dataclass(frozen=True, slots=True)
class Postprocess:
    """Turns the last decoder layer's predictions into detections; applies no score threshold."""

    softmax: bool
    """True: each query's best class that is not no-object (DETR). False: the 100 best pairs of
    query and class (Deformable DETR, Zhu et al. 2021)."""

    @torch.no_grad()
    def __call__(self, outputs: Outputs, original_sizes: Tensor) -> list[Detections]:
        """Convert the outputs of a batch; returns one `Detections` per image, on their device.

        `original_sizes` is int [B, 2], (height, width) of the original images, pixels.
        """
        logits = full_precision(outputs.logits[-1])
        boxes_xyxy = cxcywh_to_xyxy(full_precision(outputs.boxes_cxcywh[-1])).clamp(0, 1)
        sizes = original_sizes.to(boxes_xyxy.device, boxes_xyxy.dtype)
        boxes_xyxy = boxes_xyxy * sizes.flip(1).repeat(1, 2)[:, None]
        if self.softmax:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, query = scores.sort(dim=1, descending=True, stable=True)
            labels = labels.take_along_dim(query, dim=1)
        else:
            # A stable sort: topk's choice among equal scores differs between devices.
            scores, pair = logits.sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
            scores, pair = scores[:, :_MAX_DETECTIONS], pair[:, :_MAX_DETECTIONS]
            labels, query = pair % logits.shape[-1], pair // logits.shape[-1]
        boxes_xyxy = boxes_xyxy.take_along_dim(query[..., None], dim=1)
        return [Detections(*image) for image in zip(scores, labels, boxes_xyxy, strict=True)]


def build_postprocess(model: params.Model) -> Postprocess:
    """Build the postprocessing of a preset from section `model` of params.yaml."""
    return Postprocess(softmax=model.preset == "detr")
