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

    def __call__(self, outputs: Outputs, original_sizes: Tensor) -> list[Detections]:
        """Convert the outputs of a batch; returns one `Detections` per image, on their device.

        `original_sizes` is int [B, 2], (height, width) of the original images, pixels.
        """
        return unpack(self.pack(outputs, original_sizes))

    @torch.no_grad()
    def pack(self, outputs: Outputs, original_sizes: Tensor) -> Tensor:
        """Convert the outputs of a batch to one tensor, to copy it from the device at once.

        Args:
            outputs: of B images.
            original_sizes: int [B, 2], (height, width) of the original images, pixels.

        Returns:
            [B, n, 6]: box xyxy in pixels, score, class index; see `unpack`.
        """
        scores, labels, boxes_xyxy = self.select(outputs.logits[-1], outputs.boxes_cxcywh[-1])
        sizes = original_sizes.to(boxes_xyxy.device, boxes_xyxy.dtype, non_blocking=True)
        boxes_xyxy = boxes_xyxy * sizes.flip(1).repeat(1, 2)[:, None]
        # float32 holds whole numbers to 2^24.
        rest = torch.stack([scores.to(boxes_xyxy.dtype), labels.to(boxes_xyxy.dtype)], dim=-1)
        return torch.cat([boxes_xyxy, rest], dim=-1)

    def select(self, logits: Tensor, boxes_cxcywh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select the best detections of each image, best first.

        Args:
            logits: [B, Q, K], with softmax [B, Q, K + 1].
            boxes_cxcywh: [B, Q, 4] in 0..1.

        Returns:
            Scores [B, n] in 0..1, labels int64 [B, n], boxes xyxy [B, n, 4] as fractions of the
            image's size, clipped to 0..1; n is at most 100.
        """
        logits = full_precision(logits)
        boxes_xyxy = cxcywh_to_xyxy(full_precision(boxes_cxcywh)).clamp(0, 1)
        if self.softmax:
            best, classes = logits.softmax(-1)[..., :-1].max(-1)
            scores, query = _best(best)
            labels = classes.gather(1, query)
        else:
            scores, pair = _best(logits.sigmoid().flatten(1))
            labels, query = pair % logits.shape[-1], pair // logits.shape[-1]
        return scores, labels, boxes_xyxy.gather(1, query[..., None].expand(-1, -1, 4))


def unpack(packed: Tensor) -> list[Detections]:
    """Return the detections of each image of `Postprocess.pack`; its tensor holds their memory."""
    labels = packed[..., 5].to(torch.int64)
    images = zip(packed[..., 4], labels, packed[..., :4], strict=True)
    return [Detections(*image) for image in images]


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest scores [B, n] of [B, N], descending, and their indices int64 [B, n]."""
    if torch.onnx.is_in_onnx_export():
        # ONNX's TopK takes the first of equal scores, as a stable sort does.
        top = scores.topk(min(int(scores.shape[1]), _MAX_DETECTIONS), dim=1)
        return top.values, top.indices
    # A stable sort: topk's choice among equal scores differs between devices.
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :_MAX_DETECTIONS], indices[:, :_MAX_DETECTIONS]


def build_postprocess(model: params.Model) -> Postprocess:
    """Build the postprocessing of a preset from section `model` of params.yaml."""
    return Postprocess(softmax=model.preset == "detr")
