"""Denoising queries (DN-DETR, Li et al. 2022): noised true boxes that the decoder must restore.

Shapes: B images, N boxes of all images, G groups, M the most boxes of an image (at least 1),
P = G * M denoising queries per image, Q learned queries, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runkey.model.targets import Targets


@dataclass(frozen=True, slots=True)
class NoisedQueries:
    """Queries that stand before the learned ones."""

    content: Tensor
    """[B, P, D]."""
    box_logits: Tensor
    """[B, P, 4]."""
    mask: Tensor
    """bool [B, 1, P + Q, P + Q], True where a query may be seen."""
    slots: Tensor
    """int64 [G * N], see `DenoisingOutputs`."""
    targets: Tensor
    """int64 [G * N]."""


class Denoiser(nn.Module):
    """Makes noised queries.  Its random numbers are torch's global ones of the device."""

    def __init__(
        self, dim: int, num_classes: int, *, groups: int, label_noise: float, box_noise: float
    ) -> None:
        super().__init__()
        self.groups = groups
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.label_embed = nn.Embedding(num_classes, dim)

    def forward(self, targets: Targets, num_queries: int) -> NoisedQueries:
        """Noise the targets; images with fewer boxes than M get filling that nobody sees."""
        batch, width = len(targets.counts), max(1, *targets.counts)
        device, dtype = targets.boxes_cxcywh.device, self.label_embed.weight.dtype
        slots, sources = _slots(targets.counts, self.groups, width)
        used = _used(slots, batch, self.groups * width)
        mask = _mask(used, self.groups, width, num_queries)
        slots, sources, mask = (x.to(device, non_blocking=True) for x in (slots, sources, mask))
        labels = torch.zeros(batch * self.groups * width, dtype=torch.int64, device=device)
        labels[slots] = self._noised_labels(targets.labels[sources])
        boxes = torch.full((len(labels), 4), 0.5, dtype=dtype, device=device)
        boxes[slots] = self._noised_boxes(targets.boxes_cxcywh[sources].to(dtype))
        shape = (batch, self.groups * width)
        return NoisedQueries(
            self.label_embed(labels).view(*shape, -1),
            boxes.clamp(1e-3, 1 - 1e-3).logit().view(*shape, -1),
            mask,
            slots,
            sources,
        )

    def _noised_labels(self, labels: Tensor) -> Tensor:
        random = torch.randint_like(labels, self.label_embed.num_embeddings)
        swap = torch.rand(labels.shape, device=labels.device) < self.label_noise
        return torch.where(swap, random, labels)

    def _noised_boxes(self, boxes_cxcywh: Tensor) -> Tensor:
        """The centre moves by up to half the noise times the size, the size by the noise."""
        size = boxes_cxcywh[:, 2:]
        noise = (torch.rand_like(boxes_cxcywh) * 2 - 1) * self.box_noise
        return boxes_cxcywh + noise * torch.cat((size / 2, size), dim=-1)


def _slots(counts: tuple[int, ...], groups: int, width: int) -> tuple[Tensor, Tensor]:
    """Where each noised copy stands among B * P queries, and which target it is a copy of."""
    slots, targets, first = [], [], 0
    for image, count in enumerate(counts):
        for group in range(groups):
            start = (image * groups + group) * width
            slots.append(torch.arange(start, start + count))
            targets.append(torch.arange(first, first + count))
        first += count
    return torch.cat(slots), torch.cat(targets)


def _used(slots: Tensor, batch: int, queries: int) -> Tensor:
    """[B, P]: the queries that are no filling."""
    used = torch.zeros(batch * queries, dtype=torch.bool)
    used[slots] = True
    return used.view(batch, queries)


def _mask(used: Tensor, groups: int, width: int, num_queries: int) -> Tensor:
    """Learned queries see each other; a noised one sees its own group and the learned ones."""
    group = torch.arange(groups).repeat_interleave(width)
    noised = (group[:, None] == group)[None] & used[:, None, :]
    batch, queries = used.shape
    mask = torch.zeros(batch, queries + num_queries, queries + num_queries, dtype=torch.bool)
    mask[:, :queries, :queries] = noised
    mask[:, :, queries:] = True
    return mask[:, None]
