"""Preset `fast`: a DETR that converges on small data.

Reference boxes from the encoder's tokens, conditional attention, refinement from layer to layer,
and denoising queries; see `anchors`, `conditional` and `denoising` for the papers.
Shapes: B images, Q queries, P denoising queries, L decoder layers, K classes, D width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from runkey.model.anchors import ProposalHead, box_head, class_head
from runkey.model.backbone import Backbone
from runkey.model.boxes import full_precision
from runkey.model.conditional import ConditionalAttention, project_memory_conditional
from runkey.model.denoising import Denoiser, NoisedQueries
from runkey.model.detector import Detector, Memory, without_autocast
from runkey.model.layers import MLP
from runkey.model.position import GridPosition, sine
from runkey.model.targets import DenoisingOutputs, Outputs, Targets
from runkey.model.transformer import Transformer

# Ratio of wavelengths for places in 0..1, as in DAB-DETR: DETR's 10000 hardly tells them apart.
_TEMPERATURE = 20.0


class FastDetr(Detector):
    """Learned query content, positions from proposed boxes, one sigmoid per class."""

    def __init__(
        self,
        backbone: Backbone,
        transformer: Transformer,
        *,
        num_classes: int,
        num_queries: int,
        denoising_groups: int,
        label_noise: float,
        box_noise: float,
    ) -> None:
        dim = transformer.encoder.dim
        super().__init__(
            backbone,
            transformer,
            # Token by token, as statistics over the image would depend on its padding.
            nn.LayerNorm(dim),
            GridPosition(dim, temperature=_TEMPERATURE, centred=True),
        )
        self.proposal_head = ProposalHead(dim, num_classes)
        self.query_content = nn.Embedding(num_queries, dim)
        self.query_position = MLP(2 * dim, dim, dim, 2)
        self.class_embed = class_head(dim, num_classes)
        self.bbox_embed = box_head(dim)
        self.denoiser = (
            Denoiser(
                dim,
                num_classes,
                groups=denoising_groups,
                label_noise=label_noise,
                box_noise=box_noise,
            )
            if denoising_groups
            else None
        )

    def forward(
        self, images: Tensor, padding_mask: Tensor | None, targets: Targets | None = None
    ) -> Outputs:
        """See `Detector.forward`; logits are [L, B, Q, K]."""
        memory = self.encode(images, padding_mask)
        num_queries = self.query_content.num_embeddings
        with without_autocast(images.device):
            proposals, box_logits = self.proposal_head(memory, num_queries)
        content = self.query_content.weight.expand(len(images), -1, -1)
        noised = None
        if self.denoiser is not None and self.training and targets is not None:
            noised = self.denoiser(targets, num_queries)
            content = torch.cat((noised.content, content), dim=1)
            box_logits = torch.cat((noised.box_logits, box_logits), dim=1)
        logits, boxes = self._decode(content, box_logits, memory, noised)
        if self.denoiser is None or noised is None:
            return Outputs(logits, boxes, proposals)
        split = noised.content.shape[1]
        return Outputs(
            logits[:, :, split:],
            boxes[:, :, split:],
            proposals,
            DenoisingOutputs(
                logits[:, :, :split],
                boxes[:, :, :split],
                noised.slots,
                noised.targets,
                self.denoiser.groups,
            ),
        )

    def _decode(
        self, x: Tensor, box_logits: Tensor, memory: Memory, noised: NoisedQueries | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [L, B, P + Q, K] and boxes [L, B, P + Q, 4] of all layers.

        Args:
            x: content [B, P + Q, D].
            box_logits: reference boxes [B, P + Q, 4]; each layer refines the last one's.
            memory: the encoder's tokens.
            noised: the denoising queries, for their mask.
        """
        decoder = self.transformer.decoder
        cross = [cast(ConditionalAttention, layer.multihead_attn) for layer in decoder.layers]
        pairs = project_memory_conditional(cross, memory.tokens, memory.position)
        mask = None if noised is None else noised.mask
        states, boxes = [], []
        for index, pair in enumerate(pairs):
            position, centre = self._positions(box_logits)
            x = decoder.run(index, x, position, centre, pair, mask, memory.mask)
            with without_autocast(x.device):
                state = decoder.norm(full_precision(x))
                refined = self.bbox_embed(state) + box_logits
            states.append(state)
            boxes.append(refined.sigmoid())
            # Each layer learns from its own loss only (Deformable DETR).
            box_logits = refined.detach()
        with without_autocast(x.device):
            return self.class_embed(torch.stack(states)), torch.stack(boxes)

    def _positions(self, box_logits: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' position [B, T, D], and the sine of their centres [B, T, D]."""
        dim = self.query_content.embedding_dim
        x, y, width, height = (box_logits.sigmoid() * (2 * math.pi)).unbind(-1)
        places = torch.stack((y, x, height, width), dim=-1)
        encoded = sine(places, dim // 2, _TEMPERATURE).flatten(-2)
        position: Tensor = self.query_position(encoded)
        return position, encoded[..., :dim]
