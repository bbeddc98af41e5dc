"""What both presets share: images to encoded tokens, and what a detector answers to.

Shapes: B images, H x W pixels, h x w tokens, S = h * w, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runkey.model.backbone import Backbone
from runkey.model.matcher import Outputs, Targets
from runkey.model.position import GridPosition
from runkey.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Memory:
    """The encoder's tokens."""

    tokens: Tensor
    """[B, S, D]."""
    position: Tensor
    """[B or 1, S, D]."""
    shape: tuple[int, int]
    """(h, w)."""
    padding: Tensor | None
    """bool [B, h, w], True on padding; None: no padding."""
    mask: Tensor | None
    """bool [B, 1, 1, S], True where a token may be seen; None: all."""


class Detector(nn.Module):
    """Images to boxes.  `Detr` and `FastDetr` add queries, decoder and heads.

    Parameters under `backbone.` have their own learning rate.
    """

    def __init__(
        self,
        backbone: Backbone,
        transformer: Transformer,
        input_norm: nn.Module,
        grid_position: GridPosition,
    ) -> None:
        super().__init__()
        # The reference keeps its backbone beside a positional encoding: hence the "0" in the name.
        self.backbone = nn.ModuleList([backbone])
        self.input_proj = nn.Conv2d(backbone.num_channels, transformer.encoder.dim, kernel_size=1)
        self.input_norm = input_norm
        self.transformer = transformer
        self.grid_position = grid_position

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> Memory:
        """Backbone, projection and encoder; see `forward` for the arguments."""
        features, padding = self.backbone[0](images, padding_mask)
        features = self.input_proj(features)
        height, width = features.shape[-2:]
        position = self.grid_position(padding, (height, width), features.device)
        # float32 under autocast: half precision would blur neighbouring tokens.
        position = position.to(torch.promote_types(features.dtype, position.dtype))
        mask = None if padding is None else ~padding.flatten(1)[:, None, None, :]
        tokens = self.input_norm(features.flatten(2).transpose(1, 2))
        tokens = self.transformer.encode(tokens, position, mask)
        return Memory(tokens, position, (height, width), padding, mask)

    def forward(
        self, images: Tensor, padding_mask: Tensor | None, targets: Targets | None = None
    ) -> Outputs:
        """Detect.

        Args:
            images: normalised RGB, float [B, 3, H, W].
            padding_mask: bool [B, H, W], True right of and below the valid area; None, where the
                caller knows that no image is padded, is faster.
            targets: the true boxes; read in training only, and only to make denoising queries.

        Returns:
            Predictions of all decoder layers; see `Outputs`.
        """
        raise NotImplementedError


def without_autocast(device: torch.device) -> torch.autocast:
    """Context in which heads compute in full precision (half-precision boxes cost AP)."""
    return torch.autocast(device.type, enabled=False)
