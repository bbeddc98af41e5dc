"""The part of their scale that pixels use: 12-bit values in 16-bit files come out black."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import IntensityRange

WIDE_VALUES = 1 << 16
_SMALL = 0.25
"""Fraction of the scale; pixels that use less come out nearly black, white or grey."""
_STRAY = 1e-3
"""Fraction of the darkest and of the brightest pixels that do not count as the range."""
FLAT_VARIANCE = (_SMALL * 255 / 2) ** 2 + 2 * _STRAY * 255**2
"""Upper bound of the variance of the pixels of a flat image."""
_CLIPPED = 0.01
"""Fraction of the pixels that may lie outside the range that the user has set."""


def is_flat(counts: NDArray[np.int64]) -> bool:
    """Return True if nearly all pixels lie in a small part of 0..255; `counts` of each value."""
    low, high = _without_stray(counts)
    return _is_small(low, high, 255)


def spread_bytes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pixels [65536] of each value from those [256] of each upper byte.

    They count as pixels of the least and of the greatest value that has the byte.
    """
    values = np.zeros(WIDE_VALUES, np.int64)
    values[::256] = values[255::256] = counts
    return values


@dataclass(slots=True)
class PixelRange:
    """The pixel values of a data set."""

    images: int = 0
    wide: int = 0
    """16-bit grey images."""
    values: NDArray[np.int64] = field(default_factory=lambda: np.zeros(WIDE_VALUES, np.int64))
    """[65536]: pixels of each value in them."""
    deep: int = 0
    """16-bit colour images, of which the upper byte of each value is read."""
    deep_values: NDArray[np.int64] = field(default_factory=lambda: np.zeros(WIDE_VALUES, np.int64))
    """[65536]: pixels of each value in them, see `spread_bytes`."""
    flat: list[str] = field(default_factory=list)
    """Files of which `is_flat` is true after decoding, of the other images."""

    def add(
        self, file: str, values: NDArray[np.int64] | None, *, is_grey: bool, is_flat: bool
    ) -> None:
        """Count an image; `values` are the pixels of each value of a 16-bit one."""
        self.images += 1
        if values is not None and is_grey:
            self.wide += 1
            self.values += values
        elif values is not None:
            self.deep += 1
            self.deep_values += values
        elif is_flat:
            self.flat.append(file)

    def notes(self, intensity_range: IntensityRange | None) -> Iterator[str]:
        """Note pixels that use a small part of the scale, or lie outside `intensity_range`."""
        if self.wide:
            yield from self._wide_notes(*(intensity_range or (0.0, WIDE_VALUES - 1.0)))
        if self.deep:
            what = f"16-bit colour images ({self.deep})"
            text, low, high = _describe_range(what, self.deep_values, WIDE_VALUES - 1.0)
            if _is_small(low, high, WIDE_VALUES - 1.0):
                yield (
                    f"{text} of 0..65535, of which the upper byte is read, so they have little "
                    "contrast; scale the files to 0..65535 "
                    "(data.intensity_range is for grey images)"
                )
        if 2 * len(self.flat) > self.images:
            yield (
                f"{len(self.flat)} of {self.images} images use less than a quarter of the values 0 "
                f"to 255, such as {self.flat[0]}; if they come from 12-bit or 16-bit files, scale "
                "those to 0..255"
            )

    def _wide_notes(self, black: float, white: float) -> Iterator[str]:
        what = f"16-bit images ({self.wide})"
        text, low, high = _describe_range(what, self.values, white - black)
        inside = self.values[max(0, math.ceil(black)) : max(0, math.floor(white) + 1)].sum()
        clipped = 1 - inside / self.values.sum()
        wanted = f"data.intensity_range: {_rounded(low, high)}"
        if clipped > _CLIPPED:
            yield f"{text}; {clipped:.0%} are clipped to {black:g}..{white:g}; set {wanted}"
        elif _is_small(low, high, white - black):
            yield f"{text} of {black:g}..{white:g}, so they have little contrast; set {wanted}"


def _is_small(low: float, high: float, scale: float) -> bool:
    return high - low < _SMALL * scale


def _describe_range(what: str, values: NDArray[np.int64], scale: float) -> tuple[str, int, int]:
    """Say which values are used, with few exceptions if that is a small part of the scale."""
    used = np.flatnonzero(values)
    low, high = int(used[0]), int(used[-1])
    text = f"the {what} use the values {low} to {high}"
    if not _is_small(low, high, scale) and _is_small(*(near := _without_stray(values)), scale):
        low, high = near
        text += f", nearly all of them {low} to {high}"
    return text, low, high


def _without_stray(counts: NDArray[np.int64]) -> tuple[int, int]:
    """Return the range of the values but for a few of the darkest and brightest pixels."""
    low, high = np.searchsorted(np.cumsum(counts) / counts.sum(), (_STRAY, 1 - _STRAY))
    return int(low), int(high)


def _rounded(low: int, high: int) -> list[int]:
    """Return [0, 2^bits - 1] if the values use most of it, else the values themselves."""
    most = (1 << max(1, high.bit_length())) - 1
    return [0, most] if 2 * (high - low) >= most else [low, max(high, low + 1)]
