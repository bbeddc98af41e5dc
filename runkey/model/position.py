"""Sine encodings of places: of every token of a feature map, and of boxes.

Shapes: B images, h x w tokens, D width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def sine(places: Tensor, dim: int, temperature: float) -> Tensor:
    """Sines and cosines of `places` at `dim / 2` wavelengths (Vaswani et al. 2017).

    Args:
        places: [...] in radians (one whole image is 2 pi).
        dim: even number of channels.
        temperature: ratio of the longest to the shortest wavelength, about.

    Returns:
        [..., dim], sine and cosine by turns.
    """
    # float32 whatever the model is, as the reference: its float64 results depend on this rounding.
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=places.device) / dim
    angles = places[..., None] / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def grid_position(
    padding: Tensor | None,
    shape: tuple[int, int],
    dim: int,
    *,
    temperature: float,
    centred: bool,
    device: torch.device,
) -> Tensor:
    """The encoding of every token's place, as part of the valid height and width.

    Padding is right and below (so rows and columns are encoded apart: h + w sines, not h * w).
    The encoding of a feature map without padding is computed once per shape.

    Args:
        padding: bool [B, h, w], True on padding; None: no padding.
        shape: (h, w).
        dim: D; the first half encodes y, the second x.
        temperature: see `sine`.
        centred: places are tokens' centres; else their far edges, as in DETR.
        device: where the encoding is wanted.

    Returns:
        float32 [B or 1, h * w, D].
    """
    if padding is None:
        return _full_grid(shape, dim, temperature, centred, device)
    valid = ~padding
    return _encode(valid[:, :, 0], valid[:, 0, :], dim, temperature, centred)


def grid_centres(padding: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """float32 [B or 1, h * w, 2]: (x, y) of tokens' centres, as parts of the valid width, height.

    Tokens on padding lie outside 0..1; see `grid_position` for the arguments.
    """
    if padding is None:
        rows, columns = (torch.ones(1, n, dtype=torch.bool, device=device) for n in shape)
    else:
        rows, columns = ~padding[:, :, 0], ~padding[:, 0, :]
    y, x = ((n.cumsum(1) - 0.5) / n.sum(1, keepdim=True) for n in (rows, columns))
    height, width = shape
    x = x[:, None, :].expand(-1, height, -1)
    y = y[:, :, None].expand(-1, -1, width)
    return torch.stack((x, y), dim=-1).flatten(1, 2)


def _encode(
    valid_rows: Tensor, valid_columns: Tensor, dim: int, temperature: float, centred: bool
) -> Tensor:
    y, x = (
        sine(_places(valid, centred), dim // 2, temperature)
        for valid in (valid_rows, valid_columns)
    )
    height, width = y.shape[1], x.shape[1]
    y = y[:, :, None].expand(-1, -1, width, -1)
    x = x[:, None].expand(-1, height, -1, -1)
    return torch.cat((y, x), dim=-1).flatten(1, 2)


def _places(valid: Tensor, centred: bool) -> Tensor:
    """Radians [B, n] of positions along one axis; `valid` is bool [B, n]."""
    steps = valid.cumsum(1, dtype=torch.float32)
    length = steps[:, -1:] + 1e-6
    return ((steps - 0.5) if centred else steps) / length * (2 * math.pi)


@lru_cache(maxsize=64)
def _full_grid(
    shape: tuple[int, int], dim: int, temperature: float, centred: bool, device: torch.device
) -> Tensor:
    rows, columns = (torch.ones(1, n, dtype=torch.bool, device=device) for n in shape)
    return _encode(rows, columns, dim, temperature, centred)
