"""Sine encodings of places: of every token of a feature map, and of boxes.

Shapes: B images, h x w tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_SHAPES = 64


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


class GridPosition:
    """The encoding of every token's place, as part of the valid height and width.

    Padding is right and below, so rows and columns are encoded apart: h + w sines, not h * w.
    The encoding of a feature map without padding is computed once per shape.
    """

    def __init__(self, dim: int, *, temperature: float, centred: bool) -> None:
        """Settings of the encoding.

        Args:
            dim: D; the first half encodes y, the second x.
            temperature: see `sine`.
            centred: places are tokens' centres; else their far edges, as in DETR.
        """
        self.dim = dim
        self.temperature = temperature
        self.centred = centred
        self._full: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(
        self, padding: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Encode a feature map.

        Args:
            padding: bool [B, h, w], True on padding; None: no padding.
            shape: (h, w).
            device: where the encoding is wanted.

        Returns:
            float32 [B or 1, h * w, D].
        """
        if padding is not None:
            valid = ~padding
            return self._encode(valid[:, :, 0], valid[:, 0, :])
        key = (*shape, device)
        if key not in self._full:
            if len(self._full) >= _MAX_SHAPES:
                self._full.clear()
            # A tensor made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                rows, columns = (torch.ones(1, n, dtype=torch.bool, device=device) for n in shape)
                self._full[key] = self._encode(rows, columns)
        return self._full[key]

    def _encode(self, valid_rows: Tensor, valid_columns: Tensor) -> Tensor:
        half = self.dim // 2
        y = sine(self._places(valid_rows), half, self.temperature)
        x = sine(self._places(valid_columns), half, self.temperature)
        height, width = y.shape[1], x.shape[1]
        y = y[:, :, None].expand(-1, -1, width, -1)
        x = x[:, None].expand(-1, height, -1, -1)
        return torch.cat((y, x), dim=-1).flatten(1, 2)

    def _places(self, valid: Tensor) -> Tensor:
        """Radians [B, n] of positions along one axis; `valid` is bool [B, n]."""
        # Counted in integers: a sum of floats has no deterministic algorithm on a GPU.
        steps = valid.cumsum(1).float()
        length = steps[:, -1:] + 1e-6
        return ((steps - 0.5) if self.centred else steps) / length * (2 * math.pi)


def grid_centres(padding: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """float32 [B or 1, h * w, 2]: (x, y) of tokens' centres, as parts of the valid width, height.

    Tokens on padding get the last valid row's or column's place; see `GridPosition`.
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
