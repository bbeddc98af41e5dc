"""What `prepare` writes for later stages: the classes, and the index of each split.

    prepared/classes.json  prepared/train.safetensors  prepared/val.safetensors  ...

An index holds columns, which every process maps into its memory: opening COCO's takes
milliseconds, and processes share the pages. `safetensors.numpy.load_file` reads it too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from runkey.errors import DataError
from runkey.files import (
    LARGE,
    FormatError,
    open_plain,
    parse_json,
    read_json,
    replacing,
    write_atomically,
)

SplitName = Literal["train", "val", "test"]
IntensityRange = tuple[float, float]
"""Values of a grey image of more than 8 bits that become black and white."""


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class: its contiguous index (0..K-1), its category id in the JSON, its name."""

    index: int
    id: int
    name: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One checked image and its annotations, in pixels of the original image after rotation."""

    id: int
    """COCO image id."""
    file: str
    """Path relative to the data folder, with forward slashes."""
    width: int
    height: int
    rotate: int
    """Clockwise degrees (0, 90, 180, 270) that decoding applies, from EXIF."""
    mirror: bool
    """Decoding mirrors left-right before rotating, from EXIF."""
    boxes_xywh: tuple[tuple[float, float, float, float], ...]
    """Left, top, width, height, pixels; inside the image, with area."""
    labels: tuple[int, ...]
    """Class index (not category id) of each box."""
    areas: tuple[float, ...]
    """COCO's `area`, square pixels (of the segmentation if there is one); defines S/M/L."""
    crowd: tuple[bool, ...]
    """True for crowd regions: not trained on, and ignored by the evaluation as in COCO."""
    annotation_ids: tuple[int, ...]
    intensity_range: IntensityRange | None = None
    """What decoding scales to 0..255; None: the whole range of the file's type. In the index only
    if there is one."""

    def objects(self) -> list[tuple[tuple[float, float, float, float], int, float]]:
        """Return (box_xywh, label, area) of each annotation that is no crowd region."""
        rows = zip(self.boxes_xywh, self.labels, self.areas, self.crowd, strict=True)
        return [(box, label, area) for box, label, area, crowd in rows if not crowd]


class CocoDetection(TypedDict):
    """One detection in COCO's results format."""

    image_id: int
    category_id: int
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    """Left, top, width, height in pixels of the original image."""
    score: float


def write_classes(path: Path, classes: list[ClassName]) -> None:
    """Write classes.json, one class a line."""
    lines = ",\n".join(json.dumps(asdict(c), ensure_ascii=False) for c in classes)
    write_atomically(path, f"[\n{lines}\n]\n")


def read_classes(path: Path) -> list[ClassName]:
    """Read classes.json; a DataError if it is missing or damaged."""
    classes: list[ClassName] = _read(path, list[ClassName])
    if not classes or [one.index for one in classes] != list(range(len(classes))):
        raise DataError(f"{path}: the indices are not 0, 1, 2 ...; {_AGAIN}")
    return classes


@dataclass(frozen=True, slots=True, eq=False)
class Index(Sequence[ImageRecord]):
    """The records of a split as columns: n images, N boxes. A record is made when it is asked for.

    The boxes of image i are `starts[i]` to `starts[i + 1]`, the bytes of its file's name
    `name_starts[i]` to `name_starts[i + 1]`; see `ImageRecord`.
    """

    ids: NDArray[np.int64]
    """[n]"""
    sizes: NDArray[np.int64]
    """[n, 2]: (height, width)."""
    turns: NDArray[np.int64]
    """[n, 2]: (rotate, mirror)."""
    ranges: NDArray[np.float64]
    """[n, 2]: intensity_range; NaN: none."""
    names: NDArray[np.uint8]
    """UTF-8 bytes of all files' names."""
    name_starts: NDArray[np.int64]
    """[n + 1]"""
    starts: NDArray[np.int64]
    """[n + 1]"""
    boxes_xywh: NDArray[np.float64]
    """[N, 4]"""
    labels: NDArray[np.int64]
    """[N]"""
    areas: NDArray[np.float64]
    """[N]"""
    crowd: NDArray[np.bool]
    """[N]"""
    annotation_ids: NDArray[np.int64]
    """[N]"""
    path: Path | None = None
    """The file that is mapped; None: the columns are in memory."""

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> Index:
        """Return the index of some records; an index itself."""
        if isinstance(records, Index):
            return records
        names = [record.file.encode("utf-8", "surrogateescape") for record in records]
        ranges = [record.intensity_range or (math.nan, math.nan) for record in records]

        def column(name: str, dtype: type, *shape: int) -> NDArray[Any]:
            values = chain.from_iterable(getattr(record, name) for record in records)
            return np.array(list(values), dtype=dtype).reshape(-1, *shape)

        def starts(items: Iterable[Sequence[Any]]) -> NDArray[np.int64]:
            return np.cumsum([0, *map(len, items)], dtype=np.int64)

        return cls(
            ids=np.array([record.id for record in records], dtype=np.int64),
            sizes=_pairs([(record.height, record.width) for record in records]),
            turns=_pairs([(record.rotate, record.mirror) for record in records]),
            ranges=np.array(ranges, dtype=np.float64).reshape(-1, 2),
            names=np.frombuffer(b"".join(names), dtype=np.uint8),
            name_starts=starts(names),
            starts=starts([record.labels for record in records]),
            boxes_xywh=column("boxes_xywh", np.float64, 4),
            labels=column("labels", np.int64),
            areas=column("areas", np.float64),
            crowd=column("crowd", np.bool),
            annotation_ids=column("annotation_ids", np.int64),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name: a worker process maps the file itself."""
        if self.path:
            return read_index, (self.path,)
        return Index, tuple(getattr(self, field.name) for field in fields(self))

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        part = slice(*self.starts[i : i + 2].tolist())
        height, width = self.size(i)
        rotate, mirror, intensity_range = self.decoding(i)
        return ImageRecord(
            int(self.ids[i]), self.file(i), width, height, rotate, mirror,
            tuple(map(tuple, self.boxes_xywh[part].tolist())),
            tuple(self.labels[part].tolist()), tuple(self.areas[part].tolist()),
            tuple(self.crowd[part].tolist()), tuple(self.annotation_ids[part].tolist()),
            intensity_range,
        )  # fmt: skip

    def size(self, index: int) -> tuple[int, int]:
        """Return an image's (height, width), pixels."""
        height, width = self.sizes[index].tolist()
        return height, width

    def file(self, index: int) -> str:
        """Return an image's path relative to the data folder."""
        name = self.names[slice(*self.name_starts[index : index + 2].tolist())]
        return name.tobytes().decode("utf-8", "surrogateescape")

    def decoding(self, index: int) -> tuple[int, bool, IntensityRange | None]:
        """Return (rotate, mirror, intensity_range) of an image."""
        rotate, mirror = self.turns[index].tolist()
        black, white = self.ranges[index].tolist()
        return rotate, bool(mirror), None if math.isnan(black) else (black, white)

    def objects(self, index: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return an image's boxes xyxy [m, 4] as fractions of its sides, and labels [m].

        Crowd regions are left out, as they are not trained on.
        """
        part = slice(*self.starts[index : index + 2].tolist())
        keep = ~self.crowd[part]
        boxes = self.boxes_xywh[part][keep]
        boxes[:, 2:] += boxes[:, :2]
        height, width = self.size(index)
        return boxes / (width, height, width, height), self.labels[part][keep]

    def object_counts(self) -> NDArray[np.int64]:
        """Return the number of boxes of each image, [n], without crowd regions."""
        before = np.concatenate(([0], np.cumsum(~self.crowd, dtype=np.int64)))
        counts: NDArray[np.int64] = np.diff(before[self.starts])
        return counts


def _pairs(values: list[tuple[int, int]]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64).reshape(-1, 2)


_COLUMNS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "ids": ("I64", ("n",)),
    "sizes": ("I64", ("n", 2)),
    "turns": ("I64", ("n", 2)),
    "ranges": ("F64", ("n", 2)),
    "name_starts": ("I64", ("n + 1",)),
    "starts": ("I64", ("n + 1",)),
    "boxes_xywh": ("F64", ("N", 4)),
    "labels": ("I64", ("N",)),
    "areas": ("F64", ("N",)),
    "annotation_ids": ("I64", ("N",)),
    "crowd": ("BOOL", ("N",)),
    "names": ("U8", ("bytes",)),
}
"""Type and shape of each column, in the file's order: of 8 bytes first, so that all are aligned."""
_TYPES: dict[str, type] = {"U8": np.uint8, "BOOL": np.bool, "I64": np.int64, "F64": np.float64}
_LONGEST_HEADER = 1 << 16


class _Column(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


def index_file(prepared: Path, split: str) -> Path:
    """Return the file of a split's index."""
    return prepared / f"{split}.safetensors"


def write_index(path: Path, records: Sequence[ImageRecord]) -> None:
    """Write a split's index in the format of safetensors; equal records give equal bytes."""
    index = Index.of(records)
    header, end = dict[str, _Column](), 0
    for name, (dtype, _) in _COLUMNS.items():
        column = getattr(index, name)
        start, end = end, end + column.nbytes
        header[name] = _Column(dtype=dtype, shape=list(column.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, wanted=end) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in _COLUMNS:
            file.write(np.ascontiguousarray(getattr(index, name)).data)


def read_index(path: Path) -> Index:
    """Map a split's index into memory; a DataError if it is missing or damaged."""
    try:
        index = Index(**_map_columns(path), path=path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro prepare` first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not an index ({error}); {_AGAIN}") from None
    least = [int(column.min(initial=1)) for column in (index.sizes, index.labels + 1)]
    numbers = (index.boxes_xywh, index.areas)
    if min(least) < 1 or not all(np.isfinite(column).all() for column in numbers):
        raise DataError(f"{path}: has sizes, labels or boxes that cannot be; {_AGAIN}")
    return index


def _map_columns(path: Path) -> dict[str, NDArray[Any]]:
    with open_plain(path) as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, _LONGEST_HEADER))
        size = os.fstat(file.fileno()).st_size
    header: dict[str, _Column] = parse_json(text, dict[str, _Column])
    if list(header) != list(_COLUMNS):
        raise ValueError("other columns")
    data = np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length))
    counts: dict[str | int, int] = {2: 2, 4: 4}
    counts["n"], counts["N"], counts["bytes"] = (
        header[name]["shape"][0] for name in ("ids", "labels", "names")
    )
    counts["n + 1"] = counts["n"] + 1
    columns, end = dict[str, NDArray[Any]](), 0
    for name, (dtype, shape) in _COLUMNS.items():
        wanted = [counts[one] for one in shape]
        start, end = end, end + math.prod(wanted) * np.dtype(_TYPES[dtype]).itemsize
        if header[name] != _Column(dtype=dtype, shape=wanted, data_offsets=[start, end]):
            raise ValueError(f"{name} does not fit the others")
        columns[name] = data[start:end].view(_TYPES[dtype]).reshape(wanted)
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, not {8 + length + end}")
    for name, last in (("starts", counts["N"]), ("name_starts", counts["bytes"])):
        column = columns[name]
        if column[0] != 0 or column[-1] != last or (np.diff(column) < 0).any():
            raise ValueError(f"{name} does not rise from 0 to {last}")
    if columns["crowd"].view(np.uint8).max(initial=0) > 1 or (columns["turns"][:, 0] % 90).any():
        raise ValueError("crowd or turns are none")
    return columns


_AGAIN = "`dvc repro -f prepare` writes it again"


def _read(path: Path, form: Any) -> Any:
    try:
        return read_json(path, form, LARGE)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro prepare` first") from None
    except FormatError as error:
        raise DataError(f"{path}: {error}; {_AGAIN}") from None
