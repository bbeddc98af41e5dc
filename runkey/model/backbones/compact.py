"""A small network for small images, trained from random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from runkey import params
from runkey.model.backbones import BodySpec, layers, levels_of, strides_of


class CompactBlock(nn.Module):
    """Two convolutions and a shortcut; `residual_block` runs it."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = None
        if (inputs, stride) != (outputs, 1):
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, norm(outputs))


class Compact(layers.Body):
    """Two convolutions of stride 2, a residual block at stride 4 and one at stride 8."""

    def __init__(self, model: params.Model, spec: BodySpec) -> None:
        super().__init__(model, spec, levels_of(model))
        norm = layers.norm_layer(frozen=model.norm == "frozen", eps=spec.norm_eps)
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = norm(32)
        self.layer1 = nn.Sequential(CompactBlock(32, 32, 1, norm))
        self.layer2 = nn.Sequential(CompactBlock(32, 96, 2, norm))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.freeze()

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        """See `Body.levels`."""
        x = F.relu(layers.conv_norm(self.conv1, self.bn1, images), inplace=True)
        x = F.relu(layers.conv_norm(self.conv2, self.bn2, x), inplace=True)
        for stage in (self.layer1, self.layer2):
            x = self.run_stage(stage, x)
            yield x


def build(model: params.Model, spec: BodySpec) -> layers.Backbone:
    """Build it; see `build_backbone`."""
    return layers.Backbone(Compact(model, spec), spec, strides_of(model))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state as it is: only our own files have such weights."""
    return dict(state)
