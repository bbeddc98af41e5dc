"""Decoded images of a split in one flat file, made when a loader first needs it.

    .runkey/decoded/<digest>.npy    uint8, one dimension: the images' [h, w, 3] bytes, concatenated;
                                    then 32 bytes, the sha256 of these

It is beside the store and outside DVC's outputs, so experiments share it and DVC keeps no copies.
A missing or damaged file costs time alone: pixels are those of `CachePlan` with it and without.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import __version__ as pil_version
from PIL import features

from runkey.data import decode
from runkey.data.augment import resized_sizes
from runkey.data.image_list import IMAGE_LIST
from runkey.data.index import Index
from runkey.files import replacing
from runkey.hashing import sha256_bytes, sha256_file
from runkey.params import Data
from runkey.paths import DECODED, home_of, store_root
from runkey.units import GIB

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

HEADROOM = 1.35
"""Cached size relative to the largest output size: zooming in by augmentation (exp(0.25) = 1.28
by default) needs the additional pixels."""
_HEADER_BYTES = 128  # NumPy pads the header of a flat array to this, whatever the length
_DIGEST_BYTES = 32
_FORMAT = "decoded1"
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
        size = int(plan.offsets[-1])
        if path.stat().st_size != _HEADER_BYTES + size + _DIGEST_BYTES:
            raise ValueError("of another size")
        self._bytes = np.memmap(path, np.uint8, "r", offset=_HEADER_BYTES)

    def is_whole(self) -> bool:
        """Return True if the bytes are those that were written; it reads all of them."""
        pixels, digest = np.split(self._bytes, [-_DIGEST_BYTES])
        return hashlib.sha256(pixels.data).digest() == digest.tobytes()

    def __len__(self) -> int:
        return len(self._plan.shapes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name: a worker process maps the file, or reads images if it is gone."""
        return open_cache, (self._path, self._plan)

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
    """Return the file of a plan's images, by their content, the index and what decodes them."""
    libjpeg = features.version("libjpeg_turbo")
    parts = [_FORMAT, pil_version, libjpeg, platform.machine(), plan.shrinks]
    parts += [sha256_bytes(plan.shapes.tobytes())]
    files = (Path(decode.__file__), prepared / IMAGE_LIST, index.path)
    parts += [sha256_file(file) for file in files if file and file.is_file()]
    digest = sha256_bytes(repr(parts).encode())
    return home_of(store_root(prepared.parent)) / DECODED / f"{digest[:32]}.npy"


def open_cache(path: Path, plan: CachePlan, *, checked: bool = False) -> ImageCache | None:
    """Open the file of a plan's images; None if there is none of its size, or no image.

    If it is to be `checked`, it is None for damaged bytes too.
    """
    if not len(plan.shapes):
        return None
    try:
        cache = ImageCache(path, plan)
    except (OSError, ValueError):
        return None
    if checked and not cache.is_whole():
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
            digest = hashlib.sha256()
            for pixels in images:
                data = np.ascontiguousarray(pixels).data
                digest.update(data)
                file.write(data)
            file.write(digest.digest())
        others = sorted(path.parent.glob("*.npy"), key=lambda one: -one.stat().st_mtime)
        for old in others[_KEPT_FILES:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.info(f"images are decoded in every epoch: {error}")
