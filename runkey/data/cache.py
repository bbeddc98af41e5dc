"""Decoded images of a split in one flat file.

Those of train are shrunk to the largest size that training needs, those of val are resized as
`evaluate` reads them.

prepared/cache_train.npy    uint8, one dimension: the images' [h, w, 3] bytes, concatenated
prepared/cache_train.json   {"offsets": [...], "shapes": [[h, w], ...]}   in the index's order
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from runkey.errors import DataError
from runkey.files import LARGE, FormatError, read_json, write_atomically

HEADROOM = 1.35
"""Cached size relative to the largest output size: zooming in by augmentation (exp(0.25) = 1.28
by default) needs the additional pixels."""
_HEADER_BYTES = 128  # NumPy pads the header of a flat array to this, whatever the length


class ImageCache:
    """A split's decoded images, memory-mapped: opening is free, and processes share the pages."""

    def __init__(self, path: Path, offsets: list[int], shapes: list[list[int]]) -> None:
        """Map the file; `open_cache` reads offsets and shapes."""
        self._table = path, offsets, shapes
        self._bytes: NDArray[np.uint8] = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._table[1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name: a worker process maps the file itself."""
        return ImageCache, self._table

    def image(self, index: int) -> Tensor:
        """Read the image at a position of the index, turned: a copy, which may be modified.

        Returns uint8 [3, h, w] RGB, channels last in memory.
        """
        _, offsets, shapes = self._table
        height, width = shapes[index]
        flat = np.array(self._bytes[offsets[index] : offsets[index] + height * width * 3])
        return torch.from_numpy(flat).view(height, width, 3).permute(2, 0, 1)


class _Table(TypedDict):
    offsets: list[int]
    shapes: list[Annotated[list[int], Field(min_length=2, max_length=2)]]


def open_cache(folder: Path, split: str) -> ImageCache | None:
    """Open a split's cache in `folder` (prepared/); None if prepare made none.

    Raises:
        DataError: the cache's two files do not fit each other.
    """
    data, path = _files(folder, split)
    if not path.is_file():
        return None
    try:
        table: _Table = read_json(path, _Table, LARGE)
    except FormatError as error:
        raise DataError(f"{path}: {error}; run `dvc repro --force prepare`") from None
    want = _HEADER_BYTES + sum(h * w * 3 for h, w in table["shapes"])
    starts = list(accumulate((h * w * 3 for h, w in table["shapes"]), initial=0))[:-1]
    if table["offsets"] != starts or min(chain.from_iterable(table["shapes"]), default=1) < 1:
        raise DataError(f"{path}: offsets and shapes do not fit; run `dvc repro --force prepare`")
    have = data.stat().st_size if data.is_file() else 0
    if have != want:
        raise DataError(f"{data}: {have} bytes, not {want}; run `dvc repro --force prepare`")
    return ImageCache(data, table["offsets"], table["shapes"])


Place = tuple[int, int, int]
"""Of an image in a scratch file: offset in bytes, height, width."""


class Scratch:
    """Decoded images in a temporary file, until it is known which of them enter a cache."""

    def __init__(self, path: Path) -> None:
        """Create an empty file."""
        self._path = path
        self._file = path.open("w+b")

    def append(self, pixels: NDArray[np.uint8]) -> Place:
        """Append uint8 pixels [h, w, 3], and return their place."""
        start = self._file.tell()
        try:
            self._file.write(np.ascontiguousarray(pixels).data)
        except OSError as error:
            raise _disk_error(self._path, error) from error
        return start, int(pixels.shape[0]), int(pixels.shape[1])

    def read(self, places: Iterable[Place]) -> Iterator[NDArray[np.uint8]]:
        """Yield the images at these places; nothing may be appended after that."""
        for start, height, width in places:
            self._file.seek(start)
            data = self._file.read(height * width * 3)
            yield np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def cached_size(
    width: int, height: int, short_sides: Sequence[int], long_side: int
) -> tuple[int, int]:
    """Return the (width, height) of train's cached image: `HEADROOM` times the largest output.

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


def write_cache(folder: Path, split: str, images: Iterable[NDArray[np.uint8]]) -> None:
    """Write uint8 images [h, w, 3] in the index's order; equal images give equal bytes.

    The table is written last, so an interrupted run leaves no cache that opens.
    """
    data, table = _files(folder, split)
    temporary = data.with_name(data.name + ".tmp")
    shapes = []
    try:
        with temporary.open("wb") as file:
            file.write(b"\0" * _HEADER_BYTES)
            for pixels in images:
                file.write(np.ascontiguousarray(pixels).data)
                shapes.append(pixels.shape[:2])
            *offsets, total = accumulate((h * w * 3 for h, w in shapes), initial=0)
            file.seek(0)
            header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)
        temporary.replace(data)
        write_atomically(table, json.dumps({"offsets": offsets, "shapes": shapes}) + "\n")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(data, error) from error


def _disk_error(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be written ({error.strerror}); make room or set data.cache_gib: 0 "
        "in params.yaml"
    )


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    """The pixels and the table."""
    return folder / f"cache_{split}.npy", folder / f"cache_{split}.json"
