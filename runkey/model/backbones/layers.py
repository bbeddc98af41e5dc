"""What the bodies share: convolutions with their norms, residual blocks, frozen stages, padding.

Bodies call these functions as `layers.conv_norm`, since `runkey.memory.trace` replaces them by
ones that it watches.
Shapes: B images, H x W pixels, h x w feature cells, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runkey import params
from runkey.model.backbones import BodySpec
from runkey.model.transformer import is_traced


class FrozenNorm(nn.Module):
    """Batch norm with constants, under torchvision's names: `scale` * x + `shift`.

    Scale and shift are computed when the constants are loaded, moved or cast; after a change in
    place, load the state dict again.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.keeps_kernel = False
        """Whether the convolution before it is never trained: their product is kept, too."""
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._fold()

    def _fold(self) -> None:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", self.bias - self.running_mean * scale, persistent=False)
        self._kernel: tuple[Tensor, int, Tensor] | None = None

    def _apply(self, *arguments: Any, **options: Any) -> FrozenNorm:
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        self._fold()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # of a live norm
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._fold()

    def kernel(self, conv: nn.Conv2d) -> Tensor:
        """Return the convolution's kernel times the scale."""
        weight = conv.weight
        if not self.keeps_kernel or weight.requires_grad or is_traced() or weight.is_inference():
            return weight * self.scale[:, None, None, None]
        kept = self._kernel
        if kept is None or kept[0] is not weight or kept[1] != weight._version:
            with torch.inference_mode(False), torch.no_grad():
                kernel = weight * self.scale[:, None, None, None]
            self._kernel = kept = weight, weight._version, kernel
        return kept[2]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, h, w]."""
        return x * self.scale[:, None, None] + self.shift[:, None, None]


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Compute `norm(conv(x))`; a frozen norm only scales the kernel.

    That saves a pass over the activations and keeps them in the convolution's dtype under autocast.
    A norm that was folded into the convolution is `nn.Identity`.
    """
    if isinstance(norm, FrozenNorm):
        return convolve(conv, x, norm.kernel(conv), norm.shift)
    out: Tensor = norm(conv(x))
    return out


def convolve(conv: nn.Conv2d, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `conv(x)` with another kernel and bias, by the fast one of a CPU's algorithms."""
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and not is_traced()
    is_large = x.shape[0] * x.shape[2] * x.shape[3] >= _MANY_CELLS
    dilation = conv.dilation
    if conv.kernel_size == (1, 1) and is_plain and is_large:
        dilation = (2, 2)
    return F.conv2d(x, kernel, bias, conv.stride, conv.padding, dilation, conv.groups)


class Pointwise(nn.Conv2d):
    """A convolution of one pixel that `convolve` computes."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self, input, weight, bias)


# With one thread and fewer than 16 images torch takes its own algorithm for kernels of one pixel,
# but oneDNN's for dilated ones. A dilation changes nothing about one pixel, and oneDNN takes 4 to
# 27% less time, unless the map is small (benchmarks/results/step.md).
_MANY_CELLS = 512


def norm_layer(*, frozen: bool, eps: float) -> Callable[[int], nn.Module]:
    """Return what builds a norm: batch norm, or constants in its place."""
    return partial(FrozenNorm if frozen else nn.BatchNorm2d, eps=eps)


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
    return F.relu(out.add_(shortcut), inplace=True)


class Body(nn.Module):
    """A stem and stages of blocks, which give feature levels."""

    def __init__(self, model: params.Model, spec: BodySpec, used: Sequence[int]) -> None:
        """Keep the settings; `used` are the positions of the wanted levels in `spec.strides`.

        Subclasses build their modules after this, and then call `freeze`.
        """
        super().__init__()
        self.frozen_stages, self.checkpointing = model.frozen_stages, model.checkpointing
        self.used = tuple(used)
        self.channels = tuple(spec.channels[level] for level in used)

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the features [B, C, h, w] of images [B, 3, H, W] level by level, finest first."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of the used levels."""
        features = []
        for level, x in enumerate(self.levels(images)):
            if level in self.used:
                features.append(x)
        return features

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
                for norm in module.modules():
                    if isinstance(norm, FrozenNorm):
                        norm.keeps_kernel = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Body:
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for stage in self.stages()[: self.frozen_stages]:
            for module in stage:
                module.eval()
        return self

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """Run all blocks of a stage, under activation checkpointing if it is on."""
        for block in cast(nn.Sequential, stage):
            if self.checkpointing and block.training:
                # Contexts of the forward pass and of its recomputation.
                contexts = partial(lambda block: (nullcontext(), _scratch_statistics(block)), block)
                x = checkpoint(self.run_block, block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = self.run_block(block, x)
        return x

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run one block of a stage."""
        return residual_block(block, x)


class Backbone(nn.Module):
    """A body under the name that it has in the reference's state dict, padded as it needs."""

    def __init__(self, body: Any, spec: BodySpec, strides: Sequence[int]) -> None:
        """Args: body: images to a list of features. strides: of the levels that it returns."""
        super().__init__()
        self.body, self.spec, self.strides = body, spec, tuple(strides)
        self.channels: tuple[int, ...] = body.channels

    def forward(self, images: Tensor, padding: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Compute the features of each level, and resize the padding to them.

        A body with a padding rule sees images that are padded with zeros (the mean colour) to its
        multiple; the cells on that padding are cut off again, so that every body returns
        ceil(H / stride) x ceil(W / stride) cells.

        Args:
            images: normalised, [B, 3, H, W].
            padding: bool [B, H, W], True on padding; None: no padding.

        Returns:
            Features [B, C, h, w] of each level, and the padding bool [B, h, w] or None.
        """
        multiple = self.spec.pad_multiple
        if multiple == 1:
            return [
                (x, None if padding is None else _resized(padding, x)) for x in self.body(images)
            ]
        height, width = images.shape[-2:]
        rows, columns = ((n + multiple - 1) // multiple * multiple - n for n in (height, width))
        # Also where nothing is missing: it makes memory a function of the size alone.
        found: list[Tensor] = self.body(F.pad(images, (0, columns, 0, rows)))
        levels = []
        for x, s in zip(found, self.strides, strict=True):
            cut = _cut(x, (height + s - 1) // s, (width + s - 1) // s)
            levels.append((cut, None if padding is None else padding[:, ::s, ::s]))
        return levels


def _cut(x: Tensor, height: int, width: int) -> Tensor:
    """Return the upper left [B, C, height, width] of a map."""
    if is_traced():
        # Not slices: torch.export wants to prove that they are within the map.
        rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    # Unlike slices, it allocates the same blocks whether or not something is cut off.
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


def _resized(padding: Tensor, features: Tensor) -> Tensor:
    """Return the padding bool [B, H, W] at the size of features [B, C, h, w]."""
    return F.interpolate(padding[None].to(torch.uint8), size=features.shape[-2:])[0].bool()


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
