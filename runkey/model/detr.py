"""Preset `detr`: DETR (Carion et al. 2020) with the reference implementation's names and numbers.

Shapes: B images, Q queries, L decoder layers, K classes, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from runkey import params
from runkey.model.backbone import Backbone, Compact, ResNet
from runkey.model.boxes import full_precision
from runkey.model.detector import Detector, without_autocast
from runkey.model.fast import ConditionalAttention, FastDetr
from runkey.model.matcher import Outputs, Targets
from runkey.model.position import GridPosition
from runkey.model.transformer import (
    MLP,
    Attention,
    DecoderLayer,
    EncoderLayer,
    Stack,
    Transformer,
    project_memory,
)


class Detr(Detector):
    """Learned query positions, content from zero, softmax over K classes and no-object."""

    def __init__(
        self, backbone: Backbone, transformer: Transformer, *, num_classes: int, num_queries: int
    ) -> None:
        dim = transformer.encoder.dim
        super().__init__(
            backbone,
            transformer,
            nn.Identity(),
            GridPosition(dim, temperature=10000.0, centred=False),
        )
        self.query_embed = nn.Embedding(num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, dim, 4, 3)

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor | None,
        targets: Targets | None = None,  # noqa: ARG002 - see Detector
    ) -> Outputs:
        """See `Detector.forward`; logits are [L, B, Q, K + 1], no-object last."""
        memory = self.encode(images, padding_mask)
        decoder = self.transformer.decoder
        cross = [cast(Attention, layer.multihead_attn) for layer in decoder.layers]
        pairs = project_memory(cross, memory.tokens, memory.position)
        position = self.query_embed.weight[None]
        x = torch.zeros_like(position).expand(len(images), -1, -1)
        hidden = []
        for index, pair in enumerate(pairs):
            x = decoder.run(index, x, position, position, pair, None, memory.mask)
            hidden.append(x)
        with without_autocast(images.device):
            states = decoder.norm(full_precision(torch.stack(hidden)))
            return Outputs(self.class_embed(states), self.bbox_embed(states).sigmoid())


def build_model(model: params.Model, num_classes: int) -> Detector:
    """A randomly initialised detector.  Weights: see `runkey.model.weights`.

    Args:
        model: section `model` of params.yaml.
        num_classes: K.

    Returns:
        `Detr` or `FastDetr`, in training mode.  With preset detr and frozen norms its state dict
        has exactly the reference's names.
    """
    backbone = _backbone(model)
    transformer = _transformer(model)
    if model.preset == "detr":
        return Detr(backbone, transformer, num_classes=num_classes, num_queries=model.num_queries)
    return FastDetr(
        backbone,
        transformer,
        num_classes=num_classes,
        num_queries=model.num_queries,
        denoising_groups=model.denoising.groups,
        label_noise=model.denoising.label_noise,
        box_noise=model.denoising.box_noise,
    )


def _backbone(model: params.Model) -> Backbone:
    frozen_norm = model.norm == "frozen"
    if model.backbone == "compact":
        return Backbone(
            Compact(
                frozen_norm=frozen_norm,
                frozen_stages=model.frozen_stages,
                checkpointing=model.checkpointing,
            )
        )
    return Backbone(
        ResNet(
            model.backbone,
            dilation=model.dilation,
            frozen_norm=frozen_norm,
            frozen_stages=model.frozen_stages,
            checkpointing=model.checkpointing,
        )
    )


def _transformer(model: params.Model) -> Transformer:
    sizes = (model.hidden_dim, model.num_heads, model.feedforward_dim, model.dropout)
    cross = Attention if model.preset == "detr" else ConditionalAttention
    encoder = [EncoderLayer(*sizes) for _ in range(model.encoder_layers)]
    decoder = [DecoderLayer(*sizes, cross) for _ in range(model.decoder_layers)]
    return Transformer(
        Stack(encoder, model.hidden_dim, norm=False, checkpointing=model.checkpointing),
        Stack(decoder, model.hidden_dim, norm=True, checkpointing=model.checkpointing),
    )
