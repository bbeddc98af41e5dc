"""Decoded images of a split in one flat file, made when a loader first needs it.

    .runkey/decoded/<digest>.npy    uint8, one dimension: the images' [h, w, 3] bytes, concatenated

It is beside the store and outside DVC's outputs, so experiments share it and DVC keeps no copies.
A missing or damaged file costs time alone: pixels are those of `CachePlan` with it and without.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runkey.data.augment import resized_sizes
from runkey.data.image_list import IMAGE_LIST
from runkey.data.index import Index
from runkey.files import replacing
from runkey.hashing import sha256_bytes
from runkey.params import Data
from runkey.paths import home_of, store_root
from runkey.units import GIB

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

HEADROOM = 1.35
"""Cached size relative to the largest output size: zooming in by augmentation (exp(0.25) = 1.28
by default) needs the additional pixels."""
_HEADER_BYTES = 128  # NumPy pads the header of a flat array to this, whatever the length
_FORMAT = b"decoded1"
_KEPT_FILES = 8
"""The most recently used are kept; experiments with other sizes make others."""


@dataclass(frozen=True)
class CachePlan:
    """Which images of a split are kept decoded, the first ones of the index, and in which size."""

    shapes: NDArray[np.int64]
    """[k, 2]: (height, width) of the first k images, pixels."""
    shrinks: bool
    """All images of a training are resized to their shape first, whether they come from the cache
    or from files. Where the cache has only some, none are, so that it does not change pixels."""

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """[k + 1]: where the pixels of each image begin, bytes."""
        return np.cumsum([0, *(3 * self.shapes.prod(axis=1)).tolist()], dtype=np.int64)


def plan_cache(data: Data, index: Index, *, training: bool) -> CachePlan:
    """Choose the images of a split that fit into `data.cache_gib`.

    For training they are kept in `HEADROOM` times their largest output, and never larger than the
    image; for evaluation as it reads them, so that its pixels are the same without the cache.
    """
    if training:
        shapes = shrunk_sizes(index.sizes, data)
    else:
        largest = np.full(len(index), max(data.short_sides))
        shapes = resized_sizes(index.sizes, largest, data.long_side)
    limit = data.cache_gib * GIB
    if len(shapes) and 3 * shapes.prod(axis=1).sum() <= limit:
        return CachePlan(shapes, shrinks=training)
    if training:
        shapes = index.sizes
    fitting = np.searchsorted(np.cumsum(3 * shapes.prod(axis=1)), limit, side="right")
    return CachePlan(shapes[:fitting], shrinks=False)


def shrunk_sizes(sizes: NDArray[np.int64], data: Data) -> NDArray[np.int64]:
    """Return (height, width) of train's cached images, [N, 2]; the long side's bound wins."""
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    wanted = np.minimum(max(data.short_sides) / short, data.long_side / long)
    scale = np.minimum(1.0, HEADROOM * wanted)[:, None]
    shrunk: NDArray[np.int64] = np.maximum(1, np.rint(sizes * scale).astype(np.int64))
    return shrunk


class ImageCache:
    """The decoded images of a plan, memory-mapped: opening is free, processes share the pages."""

    def __init__(self, path: Path, plan: CachePlan) -> None:
        """Map the file; OSError or ValueError if it is not there or not of the plan's size."""
        self._path, self._plan = path, plan
        self._bytes: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        if path.stat().st_size != _HEADER_BYTES + plan.offsets[-1]:
            raise ValueError("of another size")

    def __len__(self) -> int:
        return len(self._plan.shapes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name: a worker process maps the file itself."""
        return ImageCache, (self._path, self._plan)

    def image(self, index: int) -> Tensor:
        """Read the image at a position of the index, turned: a copy, which may be modified.

        Returns uint8 [3, h, w] RGB, channels last in memory.
        """
        import torch  # here, since `prepare` does without

        start, stop = self._plan.offsets[index : index + 2].tolist()
        height, width = self._plan.shapes[index].tolist()
        flat = np.array(self._bytes[start:stop])
        return torch.from_numpy(flat).view(height, width, 3).permute(2, 0, 1)


def cache_file(prepared: Path, index: Index, plan: CachePlan) -> Path:
    """Return the file of a plan's images, by the content of these and of the index."""
    listed, indexed = prepared / IMAGE_LIST, index.path
    parts = [_FORMAT, plan.shapes.tobytes(), str(plan.shrinks).encode()]
    parts += [file.read_bytes() for file in (listed, indexed) if file and file.is_file()]
    digest = sha256_bytes(b"".join(bytes.fromhex(sha256_bytes(part)) for part in parts))
    return home_of(store_root(prepared.parent)) / "decoded" / f"{digest[:32]}.npy"


def open_cache(path: Path, plan: CachePlan) -> ImageCache | None:
    """Open the file of a plan's images; None if there is none that is whole, or no image."""
    if not len(plan.shapes):
        return None
    try:
        cache = ImageCache(path, plan)
    except (OSError, ValueError, EOFError):
        return None
    with suppress(OSError):
        os.utime(path)  # it is in use, see `_KEPT_FILES`
    return cache


def write_cache(path: Path, plan: CachePlan, images: Iterable[NDArray[np.uint8]]) -> None:
    """Write the images [h, w, 3] of a plan; without room for them, log so.

    The least recently used files beside it are deleted.
    """
    size = int(plan.offsets[-1])
    try:
        with replacing(path, wanted=size) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == _HEADER_BYTES
            for pixels in images:
                file.write(np.ascontiguousarray(pixels).data)
        others = sorted(path.parent.glob("*.npy"), key=lambda one: -one.stat().st_mtime)
        for old in others[_KEPT_FILES:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.info(f"images are decoded in every epoch: {error}; or set data.cache_gib: 0")
