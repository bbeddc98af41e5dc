"""ResNet-18, 34, 50 and 101 (He et al. 2016), of torchvision.

Parameters have torchvision's names, so that its weights, and the reference DETR's, load unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from runkey import params
from runkey.model.backbones import BodySpec, layers, levels_of, strides_of


class ResNet(layers.Body):
    """A ResNet without its classifier; with `dilation` (DC5) the last two strides are 16."""

    def __init__(self, model: params.Model, spec: BodySpec) -> None:
        super().__init__(model, spec, levels_of(model))
        # Imported here because it takes as long as torch's own import.
        from torchvision import models

        net = getattr(models, spec.name)(
            weights=None,
            replace_stride_with_dilation=[False, False, model.dilation],
            norm_layer=layers.norm_layer(frozen=model.norm == "frozen", eps=spec.norm_eps),
        )
        self.conv1 = net.conv1
        self.bn1 = net.bn1
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        self.freeze()

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        """See `Body.levels`."""
        x = F.relu(layers.conv_norm(self.conv1, self.bn1, images), inplace=True)
        if torch.compiler.is_exporting():
            # torch's size of a pooled map depends on whether the map's is even: a graph for every
            # size fills it up to even ones. Zeros win over nothing after ReLU.
            height, width = x.shape[2:]
            x = F.pad(x, (0, (width + 1) // 2 * 2 - width, 0, (height + 1) // 2 * 2 - height))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.run_stage(stage, x)
            yield x


def build(model: params.Model, spec: BodySpec) -> layers.Backbone:
    """Build one; see `build_backbone`."""
    return layers.Backbone(ResNet(model, spec), spec, strides_of(model))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return torchvision's weights without the classifier of ImageNet's 1000 classes."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
