"""Image features: torchvision's ResNets and a compact network for small images.

Parameters under `body` have torchvision's names, so that its weights, and the reference DETR's,
load unchanged.
Shapes: B images, H x W pixels, h x w feature cells, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def conv_norm(conv: nn.Conv2d, norm: Any, x: Tensor) -> Tensor:
    """Compute `norm(conv(x))`; a frozen norm only scales the kernel.

    That saves a pass over the activations and keeps them in the convolution's dtype under autocast.
    A norm that was folded into the convolution is `nn.Identity`.
    """
    if isinstance(norm, nn.BatchNorm2d | nn.Identity):
        out: Tensor = norm(conv(x))
        return out
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    kernel = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, kernel, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def norm_layer(*, frozen: bool) -> Callable[[int], nn.Module]:
    """Return the class of norms: batch norm, or torchvision's with fixed buffers."""
    if not frozen:
        return nn.BatchNorm2d
    # Imported here because it takes as long as torch's own import.
    from torchvision.ops import FrozenBatchNorm2d

    layer: Callable[[int], nn.Module] = FrozenBatchNorm2d
    return layer


def residual_block(block: Any, x: Tensor) -> Tensor:
    """Run torchvision's `BasicBlock` or `Bottleneck` (He et al. 2016) with `conv_norm`."""
    shortcut = x
    if block.downsample is not None:
        conv, norm = block.downsample
        shortcut = conv_norm(conv, norm, x)
    out = F.relu(conv_norm(block.conv1, block.bn1, x), inplace=True)
    out = conv_norm(block.conv2, block.bn2, out)
    if hasattr(block, "conv3"):
        out = conv_norm(block.conv3, block.bn3, F.relu(out, inplace=True))
    return F.relu(out + shortcut, inplace=True)


class Body(nn.Module):
    """A stem and stages of residual blocks; `frozen_stages` counts the stem as the first."""

    def __init__(self, *, frozen_stages: int, checkpointing: bool) -> None:
        super().__init__()
        self.frozen_stages = frozen_stages
        self.checkpointing = checkpointing

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of the stem, of layer1, and so on."""
        modules = list(self.named_children())
        stem = [module for name, module in modules if not name.startswith("layer")]
        return [stem, *([module] for name, module in modules if name.startswith("layer"))]

    def freeze(self) -> None:
        """Exclude the frozen stages from training, running statistics included."""
        for stage in self.stages()[: self.frozen_stages]:
            for module in stage:
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Body:
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for stage in self.stages()[: self.frozen_stages]:
            for module in stage:
                module.eval()
        return self

    def run_stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        """Run all blocks of a stage, under activation checkpointing if it is on."""
        for block in stage:
            if self.checkpointing and block.training:
                # Contexts of the forward pass and of its recomputation.
                contexts = partial(lambda block: (nullcontext(), _scratch_statistics(block)), block)
                x = checkpoint(residual_block, block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = residual_block(block, x)
        return x


class ResNet(Body):
    """ResNet-18, 34, 50 or 101 (He et al. 2016) without its classifier.

    The stride is 32; with `dilation` of the last stage (DC5), 16.
    """

    def __init__(
        self,
        name: str,
        *,
        dilation: bool,
        frozen_norm: bool,
        frozen_stages: int,
        checkpointing: bool,
    ) -> None:
        super().__init__(frozen_stages=frozen_stages, checkpointing=checkpointing)
        # Imported here, too, as `Compact` needs none of it.
        from torchvision import models

        net = getattr(models, name)(
            weights=None,
            replace_stride_with_dilation=[False, False, dilation],
            norm_layer=norm_layer(frozen=frozen_norm),
        )
        self.conv1 = net.conv1
        self.bn1 = net.bn1
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        self.num_channels: int = net.fc.in_features
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to features [B, C, H / stride, W / stride]."""
        x = F.relu(conv_norm(self.conv1, self.bn1, images), inplace=True)
        if torch.compiler.is_exporting():
            # torch's size of a pooled map depends on whether the map's is even: a graph for every
            # size fills it up to even ones. Zeros win over nothing after ReLU.
            height, width = x.shape[2:]
            x = F.pad(x, (0, (width + 1) // 2 * 2 - width, 0, (height + 1) // 2 * 2 - height))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.run_stage(stage, x)
        return x


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


class Compact(Body):
    """Two convolutions of stride 2, a residual block at stride 4 and one at stride 8."""

    def __init__(self, *, frozen_norm: bool, frozen_stages: int, checkpointing: bool) -> None:
        super().__init__(frozen_stages=frozen_stages, checkpointing=checkpointing)
        norm = norm_layer(frozen=frozen_norm)
        self.num_channels = 96
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

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to features [B, 96, H / 8, W / 8]."""
        x = F.relu(conv_norm(self.conv1, self.bn1, images), inplace=True)
        x = F.relu(conv_norm(self.conv2, self.bn2, x), inplace=True)
        return self.run_stage(self.layer2, self.run_stage(self.layer1, x))


class Backbone(nn.Module):
    """A body under the name that it has in the reference's state dict."""

    def __init__(self, body: ResNet | Compact) -> None:
        super().__init__()
        self.body = body
        self.num_channels = body.num_channels

    def forward(self, images: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute features [B, C, h, w] of images [B, 3, H, W], and resize the padding to them.

        The padding is bool [B, H, W] and [B, h, w], True on padding; None: no padding.
        """
        features = self.body(images)
        if padding is None:
            return features, None
        resized = F.interpolate(padding[None].to(torch.uint8), size=features.shape[-2:])
        return features, resized[0].bool()


@contextmanager
def _scratch_statistics(block: nn.Module) -> Iterator[None]:
    """Let norms update copies, so that recomputing does not count a batch twice."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    saved = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in saved:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in saved:
            setattr(norm, name, buffer)
