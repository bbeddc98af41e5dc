"""Encoder and decoder layers, shared by both presets.

Parameter names are the reference DETR's, so that its state dict loads unchanged.
Shapes: B images, S tokens, T queries, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runkey.model.attention import Attention


class _FeedForward(nn.Module):
    """The second half of every layer: two linear layers on each token."""

    def __init__(self, dim: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.dropout = dropout

    def feed_forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        projected: Tensor = self.linear2(self.drop(F.relu(self.linear1(x))))
        return projected

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, in training and where there is any."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class EncoderLayer(_FeedForward):
    """Self-attention and feed-forward, each followed by its norm (post-norm)."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__(dim, feedforward_dim, dropout)
        self.self_attn = Attention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, S, D], position [B or 1, S, D], mask as in `Attention`; [B, S, D]."""
        x = self.norm1(x + self.drop(self.self_attn.attend_self(x, position, mask)))
        out: Tensor = self.norm2(x + self.drop(self.feed_forward(x)))
        return out


class DecoderLayer(_FeedForward):
    """Self-attention, attention to the encoder's tokens, feed-forward (post-norm)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        cross_attention: type[Attention] = Attention,
    ) -> None:
        super().__init__(dim, feedforward_dim, dropout)
        self.self_attn = Attention(dim, num_heads, dropout)
        self.multihead_attn = cross_attention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        cross_position: Tensor,
        keys_values: tuple[Tensor, Tensor],
        self_mask: Tensor | None,
        memory_mask: Tensor | None,
    ) -> Tensor:
        """One layer.

        Args:
            x: queries' content [B, T, D].
            position: queries' position [B or 1, T, D] for self-attention.
            cross_position: the same for the attention to memory.
            keys_values: this layer's projections of the encoder's tokens.
            self_mask: bool, True where a query may be seen by a query; None: all.
            memory_mask: bool, True where a token may be seen; None: all.

        Returns:
            [B, T, D].
        """
        x = self.norm1(x + self.drop(self.self_attn.attend_self(x, position, self_mask)))
        seen = self.multihead_attn.attend_memory(x, cross_position, keys_values, memory_mask)
        x = self.norm2(x + self.drop(seen))
        out: Tensor = self.norm3(x + self.drop(self.feed_forward(x)))
        return out


class Stack(nn.Module):
    """Layers under the name `layers`, and a norm where the decoder has one.

    `run(i, ...)` calls layer i, under activation checkpointing where that is on.
    """

    def __init__(
        self,
        layers: list[EncoderLayer] | list[DecoderLayer],
        dim: int,
        *,
        norm: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(layers)
        if norm:
            self.norm = nn.LayerNorm(dim)
        self.checkpointing = checkpointing

    def run(self, index: int, *inputs: object) -> Tensor:
        """The output of one layer."""
        layer = self.layers[index]
        if self.checkpointing and self.training:
            recomputed: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
            return recomputed
        out: Tensor = layer(*inputs)
        return out


class Transformer(nn.Module):
    """`transformer.encoder` and `transformer.decoder`, Xavier-initialised as DETR's."""

    def __init__(self, encoder: Stack, decoder: Stack) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def encode(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """All encoder layers: tokens [B, S, D], position [B or 1, S, D], mask; [B, S, D]."""
        for index in range(len(self.encoder.layers)):
            x = self.encoder.run(index, x, position, mask)
        return x
