"""Sine position encodings of a feature map's tokens and of boxes.

Shapes: B images, h x w tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_SHAPES = 64


def sine(radians: Tensor, dim: int, temperature: float) -> Tensor:
    """Encode positions as sines and cosines at `dim / 2` wavelengths (Vaswani et al. 2017).

    Args:
        radians: [...]; 2 pi is the whole image.
        dim: number of channels, even.
        temperature: approximate ratio of the longest to the shortest wavelength.

    Returns:
        [..., dim]; sine and cosine alternate.
    """
    # float32 for every model, as in the reference: its float64 results depend on this rounding.
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=radians.device) / dim
    angles = radians[..., None] / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class GridPosition:
    """The encoding of every token's position, relative to the valid height and width.

    Padding is right and below, so rows and columns are encoded separately: h + w sines, not h * w.
    The encoding of a feature map without padding is computed once per shape.
    """

    def __init__(self, dim: int, *, temperature: float, centred: bool) -> None:
        """Set the encoding up.

        Args:
            dim: D; the first half encodes y, the second x.
            temperature: see `sine`.
            centred: encode the tokens' centres; else their far edges, as in DETR.
        """
        self.dim = dim
        self.temperature = temperature
        self.centred = centred
        self._unpadded: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(
        self, padding: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Encode a feature map.

        Args:
            padding: bool [B, h, w], True on padding; None: no padding.
            shape: (h, w).
            device: device of the encoding.

        Returns:
            float32 [B or 1, h * w, D].
        """
        if padding is not None:
            return self._encode(*_valid_rows_columns(padding, shape, device))
        key = (*shape, device)
        if key not in self._unpadded:
            if len(self._unpadded) >= _MAX_SHAPES:
                self._unpadded.clear()
            # A tensor made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                self._unpadded[key] = self._encode(*_valid_rows_columns(None, shape, device))
        return self._unpadded[key]

    def _encode(self, valid_rows: Tensor, valid_columns: Tensor) -> Tensor:
        half = self.dim // 2
        y = sine(self._radians(valid_rows), half, self.temperature)
        x = sine(self._radians(valid_columns), half, self.temperature)
        height, width = y.shape[1], x.shape[1]
        y = y[:, :, None].expand(-1, -1, width, -1)
        x = x[:, None].expand(-1, height, -1, -1)
        return torch.cat((y, x), dim=-1).flatten(1, 2)

    def _radians(self, valid: Tensor) -> Tensor:
        """Positions [B, n] along one axis; `valid` is bool [B, n]."""
        # Counted in integers: a sum of floats has no deterministic algorithm on a GPU.
        steps = valid.cumsum(1).float()
        length = steps[:, -1:] + 1e-6
        return ((steps - 0.5) if self.centred else steps) / length * (2 * math.pi)


def grid_centres(padding: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return the tokens' centres as fractions of the valid width and height.

    Args:
        padding: bool [B, h, w], True on padding; None: no padding. A token on padding gets the
            position of the last valid row or column.
        shape: (h, w).
        device: device of the result.

    Returns:
        float32 [B or 1, h * w, 2], (x, y).
    """
    rows, columns = _valid_rows_columns(padding, shape, device)
    y, x = ((n.cumsum(1) - 0.5) / n.sum(1, keepdim=True) for n in (rows, columns))
    height, width = shape
    x = x[:, None, :].expand(-1, height, -1)
    y = y[:, :, None].expand(-1, -1, width)
    return torch.stack((x, y), dim=-1).flatten(1, 2)


def _valid_rows_columns(
    padding: Tensor | None, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bool [B or 1, h] and [B or 1, w], True on rows and columns that hold image."""
    if padding is None:
        rows, columns = (torch.ones(1, n, dtype=torch.bool, device=device) for n in shape)
        return rows, columns
    return ~padding[:, :, 0], ~padding[:, 0, :]
