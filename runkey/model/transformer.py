"""Position encodings, attention, encoder and decoder layers, shared by both presets.

Parameter names are the reference DETR's, so that its state dict loads unchanged.
Shapes: B images, h x w tokens of a feature map, S = h * w encoder tokens, T queries (or tokens in
self-attention), D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_MAX_SHAPES = 64


def sine(radians: Tensor, dim: int, temperature: float) -> Tensor:
    """Encode positions as sines and cosines at `dim / 2` wavelengths (Vaswani et al. 2017).

    Args:
        radians: [...]; 2 pi is the whole image.
        dim: number of channels, even; sine and cosine alternate in them.
        temperature: approximate ratio of the longest to the shortest wavelength.
    """
    # float32 for every model, as in the reference: its float64 results depend on this rounding.
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=radians.device) / dim
    angles = radians[..., None] / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def is_traced() -> bool:
    """Return True while a graph is recorded, whose shapes are symbols (export, compilation)."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or bool(tracing)


class GridPosition:
    """The encoding of every token's position, relative to the valid height and width.

    Padding is right and below, so rows and columns are encoded separately: h + w sines, not h * w.
    The first half of the channels encodes y, the second x. The encoding of a feature map without
    padding is computed once per shape.
    """

    def __init__(self, dim: int, *, temperature: float, centred: bool) -> None:
        """Encode the tokens' centres, or (not `centred`) their far edges, as in DETR."""
        self.dim, self.temperature, self.centred = dim, temperature, centred
        self._unpadded: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(
        self, padding: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Encode a feature map of `shape` (h, w); returns float32 [B or 1, S, D].

        `padding` is bool [B, h, w], True on padding; None: no padding.
        """
        # What is computed while a graph is recorded is no tensor to keep.
        if padding is not None or is_traced():
            return self._encode(*_steps(padding, shape, device))
        key = (*shape, device)
        if key not in self._unpadded:
            if len(self._unpadded) >= _MAX_SHAPES:
                self._unpadded.clear()
            # A tensor made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                self._unpadded[key] = self._encode(*_steps(None, shape, device))
        return self._unpadded[key]

    def _encode(self, rows: Tensor, columns: Tensor) -> Tensor:
        y = sine(self._radians(rows), self.dim // 2, self.temperature)
        x = sine(self._radians(columns), self.dim // 2, self.temperature)
        grid = torch.broadcast_tensors(y[:, :, None], x[:, None])  # type: ignore[no-untyped-call]
        return torch.cat(grid, dim=-1).flatten(1, 2)

    def _radians(self, steps: Tensor) -> Tensor:
        """Positions [B, n] along one axis; `steps` is int64 [B, n], see `_steps`."""
        steps = steps.float()
        length = steps[:, -1:] + 1e-6
        return ((steps - 0.5) if self.centred else steps) / length * (2 * math.pi)


def grid_centres(padding: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return the tokens' centres as fractions of the valid width and height.

    A token on padding gets the position of the last valid row or column. Arguments as for
    `GridPosition`; returns float32 [B or 1, S, 2], (x, y).
    """
    y, x = ((n - 0.5) / n[:, -1:] for n in _steps(padding, shape, device))
    grid = torch.broadcast_tensors(x[:, None], y[:, :, None])  # type: ignore[no-untyped-call]
    return torch.stack(grid, dim=-1).flatten(1, 2)


def _steps(
    padding: Tensor | None, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Int64 [B or 1, h] and [B or 1, w]: how many rows and columns hold image, up to each."""
    if padding is None:
        height, width = shape
        rows = torch.arange(1, height + 1, device=device)
        return rows[None], torch.arange(1, width + 1, device=device)[None]
    # Counted in integers: a sum of floats has no deterministic algorithm on a GPU.
    return (~padding[:, :, 0]).cumsum(1), (~padding[:, 0, :]).cumsum(1)


def dropout(x: Tensor, probability: float) -> Tensor:
    """Set elements to zero with a probability, and scale the others to keep the mean.

    On a CPU the probability is rounded to 1/65536: 16 random bits an element take a fifth of the
    time of torch's masks (benchmarks/results/step.md).
    """
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    dropped = round(probability * 2**16)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    noise = words.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
    return (x * (noise >= dropped - 2**15)).mul_(2**16 / (2**16 - dropped))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with `nn.MultiheadAttention`'s parameter names.

    The position is added to query and key, not to the value, as in DETR (Carion et al. 2020).
    Masks are bool, broadcastable to [B, H, T, S], True where attention is allowed; None: all.
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
        """Attend from a sequence [B, T, D] to itself; `position` is [B or 1, T, D]."""
        dim = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query_key = F.linear(x + position, weight[: 2 * dim], bias[: 2 * dim])
        value = F.linear(x, weight[2 * dim :], bias[2 * dim :])
        query, key, value = map(self.split_heads, (*query_key.chunk(2, dim=-1), value))
        return self.attend_heads(query, key, value, mask)

    def attend_memory(
        self, x: Tensor, position: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Attend from queries [B, T, D] to the encoder's tokens; returns [B, T, D].

        `position` [B or 1, T, D] is the queries'; `keys_values` is this layer's pair from
        `project_memory`, [B, S, D] each.
        """
        dim = x.shape[-1]
        query = F.linear(x + position, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        query, key, value = map(self.split_heads, (query, *keys_values))
        return self.attend_heads(query, key, value, mask)

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape [B, T, D] to [B, H, T, D / H]."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def attend_heads(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend in every head and apply the output projection; returns [B, T, D].

        Shapes: query [B, H, T, E], key [B, H, S, E], value [B, H, S, D / H].
        """
        probability = self.dropout if self.training else 0.0
        if probability and query.device.type == "cpu":
            # torch does the same here, as none of its CPU kernels drops, but with its own masks.
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            out = dropout(scores.softmax(-1), probability) @ value
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=probability
            )
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


def project_memory(
    layers: Sequence[Attention], memory: Tensor, position: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Compute keys and values of all decoder layers in two matrix products.

    Args:
        layers: the cross-attentions of the decoder.
        memory: the encoder's tokens [B, S, D].
        position: [B or 1, S, D], added for the keys.

    Returns:
        A pair (key, value) per layer, [B, S, D] each.
    """
    weights = [layer.in_proj_weight.chunk(3) for layer in layers]
    biases = [layer.in_proj_bias.chunk(3) for layer in layers]
    keys = F.linear(
        memory + position, torch.cat([w[1] for w in weights]), torch.cat([b[1] for b in biases])
    )
    values = F.linear(memory, torch.cat([w[2] for w in weights]), torch.cat([b[2] for b in biases]))
    count = len(layers)
    return list(zip(keys.chunk(count, dim=-1), values.chunk(count, dim=-1), strict=True))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        out: Tensor = last(x)
        return out


class _FeedForward(nn.Module):
    """The second half of every layer: two linear layers applied to each token."""

    def __init__(self, dim: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.dropout = dropout

    def feed_forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        projected: Tensor = self.linear2(self.drop(F.relu(self.linear1(x))))
        return projected

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout in training."""
        return dropout(x, self.dropout) if self.training and self.dropout else x


class EncoderLayer(_FeedForward):
    """Self-attention and feed-forward, each followed by its norm (post-norm)."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__(dim, feedforward_dim, dropout)
        self.self_attn = Attention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Run the layer on tokens [B, S, D] with position [B or 1, S, D]; returns [B, S, D]."""
        x = self.norm1(x + self.drop(self.self_attn.attend_self(x, position, mask)))
        out: Tensor = self.norm2(x + self.drop(self.feed_forward(x)))
        return out


class DecoderLayer(_FeedForward):
    """Self-attention, cross-attention to the encoder's tokens, feed-forward (post-norm)."""

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
        """Run the layer on the queries' content [B, T, D]; returns [B, T, D].

        `position` and `cross_position` [B or 1, T, D] are the queries' in self- and in
        cross-attention; `keys_values` are this layer's keys and values of the encoder's tokens.
        """
        x = self.norm1(x + self.drop(self.self_attn.attend_self(x, position, self_mask)))
        attended = self.multihead_attn.attend_memory(x, cross_position, keys_values, memory_mask)
        x = self.norm2(x + self.drop(attended))
        out: Tensor = self.norm3(x + self.drop(self.feed_forward(x)))
        return out


class Stack(nn.Module):
    """Layers under the name `layers`, and the decoder's final norm."""

    def __init__(
        self,
        layers: list[EncoderLayer] | list[DecoderLayer],
        dim: int,
        *,
        norm: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.dim, self.checkpointing = dim, checkpointing
        self.layers = nn.ModuleList(layers)
        self.depth: int | None = None
        """Layers that run in training, from the first on (`model.layer_drop`); None: all."""
        if norm:
            self.norm = nn.LayerNorm(dim)

    @property
    def active_layers(self) -> list[nn.Module]:
        """The layers that run; in evaluation all."""
        return list(self.layers)[: self.depth if self.training else None]

    def run(self, index: int, *inputs: object) -> Tensor:
        """Run layer `index`, under activation checkpointing if it is on."""
        layer = self.layers[index]
        if self.checkpointing and self.training:
            recomputed: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
            return recomputed
        out: Tensor = layer(*inputs)
        return out


class Transformer(nn.Module):
    """`transformer.encoder` and `transformer.decoder`, Xavier-initialised as in DETR."""

    def __init__(self, encoder: Stack, decoder: Stack) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def encode(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Run all encoder layers on tokens [B, S, D] with position [B or 1, S, D] and a mask."""
        for index in range(len(self.encoder.layers)):
            x = self.encoder.run(index, x, position, mask)
        return x
