"""Matches without values: what a fake step does where a real one looks at its predictions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from runkey.model.criterion import Criterion
from runkey.model.matcher import Layers, Matcher, Matches
from runkey.model.targets import Targets


class FixedMatcher(Matcher):
    """Allocates what the matcher allocates; an image's i-th box gets its i-th prediction.

    Any assignment costs the same memory: its sizes follow from the numbers of boxes alone.
    """

    @torch.no_grad()
    def __call__(self, layers: Layers, targets: Targets) -> Matches:
        """See `Matcher`; nothing is fetched from the device."""
        device = layers.logits.device
        images = _image_index(targets.counts).to(device, non_blocking=True)
        self._costs(layers, targets, images)
        pairs = _pairs(layers, targets.counts).to(device, non_blocking=True)
        return Matches(pairs[0], pairs[1])


def with_fixed_matches(criterion: Criterion) -> Criterion:
    """The same criterion with a `FixedMatcher`."""
    matcher = criterion.matcher
    return replace(
        criterion,
        matcher=FixedMatcher(matcher.class_cost, matcher.classification, matcher.l1, matcher.giou),
    )


def _image_index(counts: tuple[int, ...]) -> Tensor:
    """int64 [N]: `Targets.image_index`, whose operations fake tensors cannot run."""
    index = [image for image, count in enumerate(counts) for _ in range(count)]
    return torch.tensor(index, dtype=torch.int64)


def _pairs(layers: Layers, counts: tuple[int, ...]) -> Tensor:
    """int64 [2, R]: as `runkey.model.matcher` lays them out."""
    num_layers, batch, queries = layers.logits.shape[:3]
    predictions: list[int] = []
    targets: list[int] = []
    for layer in range(num_layers):
        first = 0
        for image, count in enumerate(counts):
            chosen = min(count, queries)
            start = (layer * batch + image) * queries
            predictions += range(start, start + chosen)
            targets += range(first, first + chosen)
            first += count
    return torch.tensor([predictions, targets], dtype=torch.int64)
