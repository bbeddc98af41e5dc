"""The detector that both presets share, and preset `detr` (Carion et al. 2020).

`Detr` has the reference implementation's parameter names and computes its numbers.
Shapes: B images, H x W pixels, h x w tokens, S = h * w, Q queries, L decoder layers, K classes,
D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from runkey.model.backbones import Backbone
from runkey.model.boxes import full_precision
from runkey.model.matcher import Outputs, Targets
from runkey.model.position import GridPosition
from runkey.model.transformer import MLP, Attention, Transformer, project_memory


@dataclass(frozen=True, slots=True)
class Memory:
    """The encoder's output tokens."""

    tokens: Tensor
    """[B, S, D]."""
    position: Tensor
    """[B or 1, S, D]."""
    shape: tuple[int, int]
    """(h, w)."""
    padding: Tensor | None
    """bool [B, h, w], True on padding; None: no padding."""
    mask: Tensor | None
    """bool [B, 1, 1, S], True where a token may be attended to; None: everywhere."""


class Detector(nn.Module):
    """Backbone, projection and encoder. `Detr` and `FastDetr` add queries, decoder and heads.

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
        # The reference keeps a positional encoding beside its backbone: hence "backbone.0.".
        self.backbone = nn.ModuleList([backbone])
        self.input_proj = nn.Conv2d(backbone.num_channels, transformer.encoder.dim, kernel_size=1)
        self.input_norm = input_norm
        self.transformer = transformer
        self.grid_position = grid_position

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> Memory:
        """Run backbone, projection and encoder; `forward` describes the arguments."""
        features, padding = self.backbone[0](images, padding_mask)
        features = self.input_proj(features)
        height, width = features.shape[-2:]
        position = self.grid_position(padding, (height, width), features.device)
        # float32 under autocast: in half precision neighbouring tokens look alike.
        position = position.to(torch.promote_types(features.dtype, position.dtype))
        mask = None if padding is None else ~padding.flatten(1)[:, None, None, :]
        tokens = self.input_norm(features.flatten(2).transpose(1, 2))
        tokens = self.transformer.encode(tokens, position, mask)
        return Memory(tokens, position, (height, width), padding, mask)

    def forward(
        self, images: Tensor, padding_mask: Tensor | None, targets: Targets | None = None
    ) -> Outputs:
        """Detect objects.

        Args:
            images: normalised RGB, float [B, 3, H, W].
            padding_mask: bool [B, H, W], True right of and below each image's valid area. None
                is faster; pass it where no image is padded.
            targets: the true boxes; only read in training, to make denoising queries.

        Returns:
            Predictions of all decoder layers.
        """
        raise NotImplementedError


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which heads compute in full precision (half precision costs AP)."""
    return torch.autocast(device.type, enabled=False)


class Detr(Detector):
    """Learned query positions, content from zero, softmax over K classes and no-object."""

    def __init__(
        self, backbone: Backbone, transformer: Transformer, *, num_classes: int, num_queries: int
    ) -> None:
        dim = transformer.encoder.dim
        position = GridPosition(dim, temperature=10000.0, centred=False)
        super().__init__(backbone, transformer, nn.Identity(), position)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, dim, 4, 3)

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor | None,
        targets: Targets | None = None,  # noqa: ARG002 - see Detector
    ) -> Outputs:
        """Detect objects as in `Detector.forward`; logits [L, B, Q, K + 1], no-object last."""
        memory = self.encode(images, padding_mask)
        decoder = self.transformer.decoder
        cross = [cast(Attention, layer.multihead_attn) for layer in decoder.layers]
        keys_values = project_memory(cross, memory.tokens, memory.position)
        position = self.query_embed.weight[None]
        x = torch.zeros_like(position).expand(len(images), -1, -1)
        hidden = []
        for index, pair in enumerate(keys_values):
            x = decoder.run(index, x, position, position, pair, None, memory.mask)
            hidden.append(x)
        with without_autocast(images.device):
            states = decoder.norm(full_precision(torch.stack(hidden)))
            return Outputs(self.class_embed(states), self.bbox_embed(states).sigmoid())
