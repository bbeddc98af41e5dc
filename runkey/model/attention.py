"""Multi-head attention without weights out, and keys and values of all decoder layers at once.

Shapes: B images, T queries, S keys, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with `nn.MultiheadAttention`'s parameter names.

    Query and key carry a position, the value does not, as in DETR (Carion et al. 2020).
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def attend_self(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of a sequence to itself.

        Args:
            x: [B, T, D].
            position: [B or 1, T, D], added to query and key.
            mask: bool, broadcastable to [B, H, T, T], True where a key may be seen; None: all.

        Returns:
            [B, T, D].
        """
        dim = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query_key = F.linear(x + position, weight[: 2 * dim], bias[: 2 * dim])
        value = F.linear(x, weight[2 * dim :], bias[2 * dim :])
        query, key = query_key.chunk(2, dim=-1)
        return self.attend_heads(
            self.split_heads(query), self.split_heads(key), self.split_heads(value), mask
        )

    def attend_memory(
        self, x: Tensor, position: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Attention of queries to the encoder's tokens.

        Args:
            x: [B, T, D].
            position: [B or 1, T, D], added to the query.
            keys_values: this layer's pair from `project_memory`, each [B, S, D].
            mask: bool, broadcastable to [B, H, T, S], True where a key may be seen; None: all.

        Returns:
            [B, T, D].
        """
        dim = x.shape[-1]
        query = F.linear(x + position, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        key, value = keys_values
        return self.attend_heads(
            self.split_heads(query), self.split_heads(key), self.split_heads(value), mask
        )

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, H, T, D / H]."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def attend_heads(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of [B, H, T or S, any width] and the output projection; [B, T, D]."""
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


def project_memory(
    layers: Sequence[Attention], memory: Tensor, position: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every decoder layer, in two matrix products instead of two a layer.

    Args:
        layers: the cross-attentions of the decoder.
        memory: the encoder's tokens [B, S, D].
        position: [B or 1, S, D], added for the keys.

    Returns:
        A pair (key, value), each [B, S, D], per layer.
    """
    weights = [layer.in_proj_weight.chunk(3) for layer in layers]
    biases = [layer.in_proj_bias.chunk(3) for layer in layers]
    keys = F.linear(
        memory + position, torch.cat([w[1] for w in weights]), torch.cat([b[1] for b in biases])
    )
    values = F.linear(memory, torch.cat([w[2] for w in weights]), torch.cat([b[2] for b in biases]))
    count = len(layers)
    return list(zip(keys.chunk(count, dim=-1), values.chunk(count, dim=-1), strict=True))
