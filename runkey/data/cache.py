"""Decoded images of a split in one flat file, shrunk to what training can use.

prepared/cache_train.npy    uint8, one dimension: the images' [h, w, 3] bytes, one after another
prepared/cache_train.json   {"offsets": [...], "shapes": [[h, w], ...]}   in the index's order
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from runkey.errors import DataError

# How much larger than the largest wanted size an image is kept, so that zooming in by
# augmentation (exp(0.25) = 1.28 by default) still has pixels to show.
HEADROOM = 1.35
_HEADER_BYTES = 128


class ImageCache:
    """A split's decoded images, memory-mapped: opening costs nothing, processes share the pages."""

    def __init__(
        self, folder: Path, split: str, offsets: list[int], shapes: list[list[int]]
    ) -> None:
        """Map the file; use `open_cache`, which reads offsets and shapes."""
        self._folder = folder
        self._split = split
        self._offsets = offsets
        self._shapes = shapes
        self._bytes: NDArray[np.uint8] = np.load(_data_path(folder, split), mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process maps the file anew; pickling the pixels would copy all of them."""
        return ImageCache, (self._folder, self._split, self._offsets, self._shapes)

    def image(self, index: int) -> Tensor:
        """The image at `index` of the split's index, turned as its record says.

        Returns:
            uint8 [3, h, w] RGB, channels last in memory; a copy, free to be written to.
        """
        height, width = self._shapes[index]
        start = self._offsets[index]
        flat = np.array(self._bytes[start : start + height * width * 3])
        return torch.from_numpy(flat).view(height, width, 3).permute(2, 0, 1)


def open_cache(folder: Path, split: str) -> ImageCache | None:
    """The split's cache in `folder` (prepared/), or None if prepare made none.

    Raises:
        DataError: the two files of the cache do not fit each other; says to run prepare.
    """
    path = _table_path(folder, split)
    if not path.is_file():
        return None
    table = json.loads(path.read_text(encoding="utf-8"))
    offsets, shapes = table["offsets"], table["shapes"]
    data = _data_path(folder, split)
    want = _HEADER_BYTES + sum(h * w * 3 for h, w in shapes)
    have = data.stat().st_size if data.is_file() else 0
    if have != want:
        raise DataError(f"{data}: {have} bytes, not {want}; run `dvc repro --force prepare`")
    return ImageCache(folder, split, offsets, shapes)


class Scratch:
    """Decoded images on their way to a cache, kept on disk until it is known which of them stay."""

    def __init__(self, path: Path) -> None:
        """Start an empty scratch file at `path`."""
        self._path = path
        self._file = path.open("wb")
        self._places: list[tuple[int, int, int]] = []

    def append(self, pixels: NDArray[np.uint8]) -> int:
        """Keep [h, w, 3] uint8 pixels; returns the number to ask for them by.

        Raises:
            DataError: the disk does not take them.
        """
        self._places.append((self._file.tell(), int(pixels.shape[0]), int(pixels.shape[1])))
        try:
            self._file.write(np.ascontiguousarray(pixels).data)
        except OSError as error:
            raise _disk_error(self._path, error) from error
        return len(self._places) - 1

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Bytes that the images of these numbers take."""
        return sum(self._places[n][1] * self._places[n][2] * 3 for n in numbers)

    def read(self, numbers: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        """The images of these numbers, one after another."""
        self._file.flush()
        with self._path.open("rb") as file:
            for number in numbers:
                start, height, width = self._places[number]
                file.seek(start)
                content = file.read(height * width * 3)
                yield np.frombuffer(content, dtype=np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def cached_size(
    width: int, height: int, short_sides: Sequence[int], long_side: int
) -> tuple[int, int]:
    """(width, height) that an image is cached at: `HEADROOM` times the largest that is wanted.

    Never larger than the image.  The long side's bound wins over the short side, as in resizing.
    """
    wanted = min(max(short_sides) / min(width, height), long_side / max(width, height))
    scale = min(1.0, HEADROOM * wanted)
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(image: Image.Image, short_sides: Sequence[int], long_side: int) -> Image.Image:
    """The image at the size that it is cached at; see `cached_size`."""
    size = cached_size(image.width, image.height, short_sides, long_side)
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC)  # PIL's shrinking is antialiased


def cache_bytes(
    sizes: Iterable[tuple[int, int]], short_sides: Sequence[int], long_side: int
) -> int:
    """Bytes that images of the given (width, height) take in a cache."""
    shrunk = (cached_size(w, h, short_sides, long_side) for w, h in sizes)
    return sum(w * h * 3 for w, h in shrunk)


def write_cache(folder: Path, split: str, images: Iterable[NDArray[np.uint8]]) -> int:
    """Write [h, w, 3] uint8 images, in the index's order; the same images give the same bytes.

    The table is written last, so that a run that is cut short leaves no cache that opens.

    Returns:
        Bytes of pixels written.

    Raises:
        DataError: the disk does not take it.
    """
    data, table = _data_path(folder, split), _table_path(folder, split)
    temporary = data.with_name(data.name + ".tmp")
    offsets: list[int] = []
    shapes: list[list[int]] = []
    total = 0
    try:
        with temporary.open("wb") as file:
            file.write(b"\0" * _HEADER_BYTES)
            for pixels in images:
                file.write(np.ascontiguousarray(pixels).data)
                offsets.append(total)
                shapes.append([int(pixels.shape[0]), int(pixels.shape[1])])
                total += math.prod(pixels.shape)
            file.seek(0)
            file.write(_npy_header(total))
        temporary.replace(data)
        text = json.dumps({"offsets": offsets, "shapes": shapes})
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(table)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(data, error) from error
    return total


def _disk_error(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be written ({error.strerror}); make room or set data.cache_gib: 0 "
        "in params.yaml"
    )


def _npy_header(length: int) -> bytes:
    """Version 1.0 header of a flat uint8 array, padded to a size that any length fits in."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({length},), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (_HEADER_BYTES - 10).to_bytes(2, "little")
        + (text.ljust(_HEADER_BYTES - 11) + "\n").encode("ascii")
    )


def _data_path(folder: Path, split: str) -> Path:
    return folder / f"cache_{split}.npy"


def _table_path(folder: Path, split: str) -> Path:
    return folder / f"cache_{split}.json"
