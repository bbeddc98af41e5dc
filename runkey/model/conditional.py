"""Conditional cross-attention: content meets content, place meets place.

Shapes: B images, T queries, S keys, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runkey.model.attention import Attention
from runkey.model.layers import MLP


class ConditionalAttention(Attention):
    """Cross-attention of Conditional DETR (Meng et al. 2021) and DAB-DETR (Liu et al. 2022).

    The place of a query (the sine of its box's centre, scaled by an MLP of its content) is
    compared with the places of keys apart from the content, by concatenation in every head.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout)
        self.scale = MLP(dim, dim, dim, 2)
        self.query_position = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)

    def attend_memory(
        self, x: Tensor, position: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Attention of queries to the encoder's tokens.

        Args:
            x: content [B, T, D].
            position: sine of the reference centres [B, T, D].
            keys_values: from `project_memory_conditional`: keys [B, H, S, 2 D / H], values
                [B, H, S, D / H].
            mask: as in `Attention.attend_memory`.

        Returns:
            [B, T, D].
        """
        dim = x.shape[-1]
        content = F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        place = self.query_position(position * self.scale(x))
        query = torch.cat([self.split_heads(content), self.split_heads(place)], dim=-1)
        return self.attend_heads(query, *keys_values, mask)


def project_memory_conditional(
    layers: Sequence[ConditionalAttention], memory: Tensor, position: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Keys (content and place) and values of every decoder layer, in two matrix products.

    Args:
        layers: the cross-attentions of the decoder.
        memory: the encoder's tokens [B, S, D].
        position: their places' encoding [B or 1, S, D].

    Returns:
        A pair per layer, split in heads: see `ConditionalAttention.attend_memory`.
    """
    dim = memory.shape[-1]
    weight = torch.cat([layer.in_proj_weight[dim:] for layer in layers])
    bias = torch.cat([layer.in_proj_bias[dim:] for layer in layers])
    contents = F.linear(memory, weight, bias).chunk(len(layers), dim=-1)
    place_weight = torch.cat([layer.key_position.weight for layer in layers])
    place_bias = torch.cat([layer.key_position.bias for layer in layers])
    places = F.linear(position, place_weight, place_bias).chunk(len(layers), dim=-1)
    pairs = []
    for layer, content, place in zip(layers, contents, places, strict=True):
        key, value = content.chunk(2, dim=-1)
        place = layer.split_heads(place).expand(len(memory), -1, -1, -1)
        pairs.append((torch.cat([layer.split_heads(key), place], dim=-1), layer.split_heads(value)))
    return pairs
