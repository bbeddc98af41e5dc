"""What the model is asked for and what it answers.

Shapes: B images, N boxes of all images together, L decoder layers, Q queries, P denoising
queries, C class logits (K classes for preset fast, K + 1 with no-object for detr).
Boxes are (centre x, centre y, width, height) as parts of the image's valid width and height.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """The true boxes of a batch, all images after one another."""

    boxes_cxcywh: Tensor
    """float [N, 4]."""
    labels: Tensor
    """int64 [N], class indices 0..K-1."""
    counts: tuple[int, ...]
    """Boxes of each image; they sum to N.  On the host: no device has to be asked."""

    def image_index(self) -> Tensor:
        """int64 [N], on the host: which image (0..B-1) each box belongs to."""
        counts = torch.tensor(self.counts, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.counts)), counts)


@dataclass(frozen=True, slots=True)
class Proposals:
    """Boxes of the encoder's best tokens (two-stage detection; preset fast)."""

    logits: Tensor
    """[B, Q, K]."""
    boxes_cxcywh: Tensor
    """[B, Q, 4]."""


@dataclass(frozen=True, slots=True)
class DenoisingOutputs:
    """Answers to the denoising queries.  `slots[i]` was made from target `targets[i]`."""

    logits: Tensor
    """[L, B, P, K]."""
    boxes_cxcywh: Tensor
    """[L, B, P, 4]."""
    slots: Tensor
    """int64 [G * N] indices into the flattened B * P queries; the other queries are filling."""
    targets: Tensor
    """int64 [G * N] indices into the batch's N boxes."""
    groups: int
    """G: noised copies of each box."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a detector's forward pass returns; the last decoder layer is the answer."""

    logits: Tensor
    """[L, B, Q, C], float32 at least."""
    boxes_cxcywh: Tensor
    """[L, B, Q, 4] in 0..1, float32 at least."""
    proposals: Proposals | None = None
    """Preset fast."""
    denoising: DenoisingOutputs | None = None
    """Preset fast with denoising groups, in training."""
