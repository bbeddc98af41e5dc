"""Decoded images of a split in one flat file, shrunk to the largest size that training needs.

prepared/cache_train.npy    uint8, one dimension: the images' [h, w, 3] bytes, concatenated
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
from runkey.files import write_atomically

HEADROOM = 1.35
"""Cached size relative to the largest output size: zooming in by augmentation (exp(0.25) = 1.28
by default) needs the additional pixels."""
_HEADER_BYTES = 128  # NumPy pads the header of a flat array to this, whatever the length


class ImageCache:
    """A split's decoded images, memory-mapped: opening is free, and processes share the pages."""

    def __init__(
        self, folder: Path, split: str, offsets: list[int], shapes: list[list[int]]
    ) -> None:
        """Map the file; `open_cache` reads offsets and shapes."""
        self._folder = folder
        self._split = split
        self._offsets = offsets
        self._shapes = shapes
        self._bytes: NDArray[np.uint8] = np.load(_data_path(folder, split), mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name: a worker process maps the file itself."""
        return ImageCache, (self._folder, self._split, self._offsets, self._shapes)

    def image(self, index: int) -> Tensor:
        """Read the image at position `index` of the split's index, rotated by its EXIF tag.

        Returns:
            uint8 [3, h, w] RGB, channels last in memory; a copy, so it may be modified.
        """
        height, width = self._shapes[index]
        start = self._offsets[index]
        flat = np.array(self._bytes[start : start + height * width * 3])
        return torch.from_numpy(flat).view(height, width, 3).permute(2, 0, 1)


def open_cache(folder: Path, split: str) -> ImageCache | None:
    """Open a split's cache in `folder` (prepared/); None if prepare made none.

    Raises:
        DataError: the cache's two files do not fit each other.
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
    """Decoded images in a temporary file, until it is known which of them enter a cache."""

    def __init__(self, path: Path) -> None:
        """Create an empty file."""
        self._path = path
        self._file = path.open("wb")
        self._places: list[tuple[int, int, int]] = []

    def append(self, pixels: NDArray[np.uint8]) -> int:
        """Append uint8 pixels [h, w, 3], and return their index.

        Raises:
            DataError: the file cannot be written.
        """
        self._places.append((self._file.tell(), int(pixels.shape[0]), int(pixels.shape[1])))
        try:
            self._file.write(np.ascontiguousarray(pixels).data)
        except OSError as error:
            raise _disk_error(self._path, error) from error
        return len(self._places) - 1

    def bytes_of(self, indices: Iterable[int]) -> int:
        """Return the size of these images in bytes."""
        return sum(self._places[i][1] * self._places[i][2] * 3 for i in indices)

    def read(self, indices: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield these images in order."""
        self._file.flush()
        with self._path.open("rb") as file:
            for index in indices:
                start, height, width = self._places[index]
                file.seek(start)
                data = file.read(height * width * 3)
                yield np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def cached_size(
    width: int, height: int, short_sides: Sequence[int], long_side: int
) -> tuple[int, int]:
    """Return the (width, height) of a cached image: `HEADROOM` times the largest output size.

    It is never larger than the image. As in resizing, the long side's bound takes precedence.
    """
    wanted = min(max(short_sides) / min(width, height), long_side / max(width, height))
    scale = min(1.0, HEADROOM * wanted)
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(image: Image.Image, short_sides: Sequence[int], long_side: int) -> Image.Image:
    """Resize an image to its `cached_size`."""
    size = cached_size(image.width, image.height, short_sides, long_side)
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC)  # PIL's shrinking is antialiased


def cache_bytes(
    sizes: Iterable[tuple[int, int]], short_sides: Sequence[int], long_side: int
) -> int:
    """Return the bytes that images of the given (width, height) take in a cache."""
    shrunk = (cached_size(w, h, short_sides, long_side) for w, h in sizes)
    return sum(w * h * 3 for w, h in shrunk)


def write_cache(folder: Path, split: str, images: Iterable[NDArray[np.uint8]]) -> int:
    """Write uint8 images [h, w, 3] in the index's order; equal images give equal bytes.

    The table is written last, so an interrupted run leaves no cache that opens.

    Returns:
        Bytes of pixels written.

    Raises:
        DataError: the files cannot be written.
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
            header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)
        temporary.replace(data)
        write_atomically(table, json.dumps({"offsets": offsets, "shapes": shapes}) + "\n")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(data, error) from error
    return total


def _disk_error(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be written ({error.strerror}); make room or set data.cache_gib: 0 "
        "in params.yaml"
    )


def _data_path(folder: Path, split: str) -> Path:
    return folder / f"cache_{split}.npy"


def _table_path(folder: Path, split: str) -> Path:
    return folder / f"cache_{split}.json"
