"""What `runkey predict` writes, image by image: lists, labels in the formats of tools, pictures.

    with Outputs(out, kinds, about) as outputs:
        outputs.add(prediction)

Lists of all images (JSON, CSV, CVAT) are written as the predictions come, under a temporary name,
and get their own name at the end; also after Ctrl-C, with what was written until then.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, Self
from xml.sax import saxutils

from PIL import Image

from runkey.errors import DataError
from runkey.files import WriteError, replacing, write_json
from runkey.inference.detections import Detections
from runkey.inference.draw import (
    SHEET_IMAGES,
    SheetImage,
    class_text,
    detected_boxes,
    draw_detections,
    draw_rows,
    fitted,
    label_fewer,
)
from runkey.inference.options import (
    CSV,
    CVAT,
    FRAMES,
    IMAGES,
    JSON,
    LABELME,
    RESULTS,
    SHEET,
    VOC,
    YOLO,
    as_utf8,
)
from runkey.model.weights import CardClass
from runkey.units import MIB, counted

MARK = "predict.json"
"""File that says what wrote a folder; a folder without it is not written to."""
SKIPPED = "skipped.csv"
_LABELS = ("yolo", "voc", "labelme", "cvat")
_OWN = (MARK, SKIPPED, JSON, RESULTS, CSV, SHEET, CVAT, YOLO, VOC, LABELME, IMAGES, FRAMES)
_QUALITY = 90
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_CONTROLS = re.compile("[\x00-\x1f]+")
_YAML_ODD = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""Characters that YAML takes for line breaks, or refuses."""
_THUMBNAIL = 420
"""Pixels of the long side of an image that waits for the sheet."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The detections of one image, and what else the outputs need of it."""

    name: str
    """Unique, with `/`, as in the lists."""
    stem: str
    """Of files about this image alone."""
    place: str
    """Absolute path of the image or of its video, or its address."""
    detections: Detections
    """Those that are written."""
    picture: Image.Image | None = None
    """The image to draw on, of any size; None if nothing is drawn."""
    frame: bytes | None = None
    """The frame of a video as a JPEG file; None if it is not written."""
    video: str = ""
    """Name of the video; empty for images."""
    number: int | None = None
    """Of the frame in the video."""
    seconds: float | None = None
    """Of the frame in the video."""

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height, pixels."""
        height, width = self.detections.image_size
        return width, height


@dataclass(frozen=True, slots=True)
class About:
    """What all outputs share."""

    classes: Sequence[CardClass]
    base: Path
    """Folder that the names of images are relative to."""
    total: int
    """Images that are expected; an estimate where there are videos."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Key and thresholds, for `MARK` and the lists."""
    ids: Mapping[str, int] = field(default_factory=dict)
    """Image ids by file name, of --coco FILE."""
    workers: int = 2
    """Threads that draw; 0: none beside the caller's."""


class Writer(Protocol):
    """One kind of output."""

    def add(self, one: Prediction) -> None:
        """Write an image's predictions."""

    def finish(self) -> None:
        """Write what can be written only at the end."""


class Outputs:
    """The chosen outputs in a folder; a context, at whose end they get their names."""

    def __init__(self, folder: Path, kinds: Sequence[str], about: About) -> None:
        """Args: folder: see `claim_folder`. kinds: of `KINDS`. about: what they share."""
        self.folder = folder
        self.about = about
        self.images = 0
        self.objects: Counter[int] = Counter()
        """Detections by class index."""
        kinds = list(dict.fromkeys(kinds))
        if any(kind in _LABELS for kind in kinds) and "frames" not in kinds:
            kinds.append("frames")
        self.kinds = tuple(kinds)
        with ExitStack() as stack:
            self.writers = [_WRITERS[kind](folder, about, stack) for kind in kinds]
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def add(self, one: Prediction) -> None:
        """Write an image's predictions to all outputs."""
        for writer in self.writers:
            writer.add(one)
        self.images += 1
        self.objects.update(one.detections.labels.tolist())

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):  # the disk is full: lists may end in the middle of a row
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            for writer in self.writers:
                writer.finish()


def claim_folder(folder: Path, about: Mapping[str, Any]) -> bool:
    """Make a folder, or take one that `runkey predict` wrote before; return True for that.

    Raises:
        DataError: it holds something else.
    """
    _check_folder(folder)
    inside = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    is_own = MARK in inside
    if is_own:  # temporary files of a run that was killed
        for name in inside:
            if name.startswith(tuple(f".{own}." for own in _OWN)) and (folder / name).is_file():
                (folder / name).unlink()
    if inside and not is_own:
        raise DataError(
            f"{folder}: holds {inside[0]}, which `runkey predict` has not written; name a new"
            " folder with --out"
        )
    write_json(folder / MARK, dict(about))
    return is_own


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Hold a folder while predictions are written to it; it is made if it is not there.

    Raises:
        DataError: another process writes there.
    """
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder}: another `runkey predict` writes there now; name another with --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _check_folder(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder}: not a folder; name a new one with --out")


class _Files:
    """Writes many small files below a folder; a link in the place of one is replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: set[Path] = set()
        self._real = Path(os.path.realpath(folder.parent), folder.name)

    def put(self, name: str, data: bytes) -> None:
        path = self.folder / name
        temporary = path.with_name(f".{path.name}.part")
        try:
            if path.parent not in self._made:
                path.parent.mkdir(parents=True, exist_ok=True)
                place = Path(os.path.realpath(path.parent))
                if place != self._real / path.parent.relative_to(self.folder):
                    raise DataError(f"{path.parent}: a link to {place}; remove it")
                self._made.add(path.parent)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise WriteError(path, error, len(data)) from None


class _Coco:
    """A complete COCO file: images, annotations with scores, categories."""

    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:
        self._about = about
        self._file = stack.enter_context(replacing(folder / JSON))
        # Two lists grow at once: annotations wait in a file of their own.
        rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the stack closes it
        self._rows = stack.enter_context(rows)
        categories = [{"id": one.id, "name": one.name} for one in about.classes]
        head = {"info": {"description": "runkey predict", **about.model}, "categories": categories}
        self._file.write(_dump(head)[:-1] + b',\n"images": [')
        self._images = self._objects = 0
        self._next_id = max(about.ids.values(), default=0) + 1

    def add(self, one: Prediction) -> None:
        image_id = self._about.ids.get(one.name)
        if image_id is None:
            image_id, self._next_id = self._next_id, self._next_id + 1
        width, height = one.size
        entry = {"id": image_id, "file_name": one.name, "width": width, "height": height}
        if one.video:
            entry |= {"video": one.video, "frame": one.number, "seconds": one.seconds}
        self._file.write(b",\n" * bool(self._images) + _dump(entry))
        self._images += 1
        for row in one.detections.to_coco(image_id):
            self._objects += 1
            area = row["bbox"][2] * row["bbox"][3]
            whole = {"id": self._objects, **row, "area": area, "iscrowd": 0}
            self._rows.write(b",\n" * (self._objects > 1) + _dump(whole))

    def finish(self) -> None:
        self._file.write(b'],\n"annotations": [')
        self._rows.seek(0)
        shutil.copyfileobj(self._rows, self._file, MIB)
        self._file.write(b"]}\n")


class _Results:
    """COCO's results format: what COCO's metrics and servers read."""

    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:
        self._ids = about.ids
        self._file = stack.enter_context(replacing(folder / RESULTS))
        self._file.write(b"[")
        self._count = 0

    def add(self, one: Prediction) -> None:
        image_id = self._ids.get(one.name)
        for row in one.detections.to_coco(image_id) if image_id is not None else ():
            self._file.write(b",\n" * bool(self._count) + _dump(row))
            self._count += 1

    def finish(self) -> None:
        self._file.write(b"]\n")


class _Csv:
    columns = ("file", "frame", "seconds", "class", "score", "x1", "y1", "x2", "y2")

    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:  # noqa: ARG002
        self._file = stack.enter_context(replacing(folder / CSV))
        self._file.write(_csv_rows([self.columns]))

    def add(self, one: Prediction) -> None:
        found = one.detections
        rows = zip(found.names, found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True)
        frame = "" if one.number is None else one.number
        seconds = "" if one.seconds is None else one.seconds
        self._file.write(
            _csv_rows(
                [one.video or one.name, frame, seconds, name, f"{score:.4f}", *map(_pixels, box)]
                for name, score, box in rows
            )
        )

    def finish(self) -> None:
        pass


class _Yolo:
    """`class cx cy w h` in fractions, without scores, which trainings would take for labels."""

    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:  # noqa: ARG002
        self._files = _Files(folder / YOLO)
        names = {one.index: one.name for one in about.classes}
        lines = [f"path: {_yaml(str(about.base))}", "train: .", "val: .", "names:"]
        lines += [f"  {index}: {_yaml(name)}" for index, name in names.items()]
        self._files.put("data.yaml", "\n".join([*lines, ""]).encode())
        # A line for each class: what would break a line becomes a space.
        classes = [_YAML_ODD.sub(" ", _CONTROLS.sub(" ", name)) for name in names.values()]
        self._files.put("classes.txt", "".join(f"{name}\n" for name in classes).encode())

    def add(self, one: Prediction) -> None:
        width, height = one.size
        lines = []
        for label, (x1, y1, x2, y2) in zip(
            one.detections.labels.tolist(), one.detections.boxes_xyxy.tolist(), strict=True
        ):
            centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
            numbers = [*centre, (x2 - x1) / width, (y2 - y1) / height]
            lines.append(" ".join([str(label), *(f"{number:.6f}" for number in numbers)]) + "\n")
        self._files.put(f"labels/{one.stem}.txt", "".join(lines).encode())

    def finish(self) -> None:
        pass


class _Voc:
    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:  # noqa: ARG002
        self._files = _Files(folder / VOC)

    def add(self, one: Prediction) -> None:
        path = PurePosixPath(one.name)
        width, height = one.size
        lines = [
            "<annotation>",
            f"  <folder>{_escaped(path.parent.name)}</folder>",
            f"  <filename>{_escaped(path.name)}</filename>",
            f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
            "  <segmented>0</segmented>",
        ]
        found = one.detections
        for name, box in zip(found.names, found.boxes_xyxy.tolist(), strict=True):
            sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            corners = "".join(f"<{side}>{_pixels(value)}</{side}>" for side, value in sides)
            lines += [
                f"  <object><name>{_escaped(name)}</name><pose>Unspecified</pose>",
                "    <truncated>0</truncated><difficult>0</difficult>",
                f"    <bndbox>{corners}</bndbox></object>",
            ]
        self._files.put(f"{one.stem}.xml", "\n".join([*lines, "</annotation>\n"]).encode())

    def finish(self) -> None:
        pass


class _Labelme:
    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:  # noqa: ARG002
        self._files, self._folder = _Files(folder / LABELME), folder

    def add(self, one: Prediction) -> None:
        found = one.detections
        shapes: list[dict[str, Any]] = [
            {
                "label": name,
                "points": [[round(x1, 2), round(y1, 2)], [round(x2, 2), round(y2, 2)]],
                "group_id": None,
                "description": f"score {score:.4f}",
                "shape_type": "rectangle",
                "flags": {},
            }
            for name, score, (x1, y1, x2, y2) in zip(
                found.names, found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True
            )
        ]
        own = f"{one.stem}.json"
        image = str(self._folder.absolute() / FRAMES / one.name) if one.video else one.place
        if "://" not in image:
            here = (self._folder.absolute() / LABELME / own).parent
            image = Path(os.path.relpath(image, here)).as_posix()
        width, height = one.size
        label: dict[str, Any] = {
            "version": "5.0.1",
            "flags": {},
            "shapes": shapes,
            "imagePath": image,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        self._files.put(own, as_utf8(json.dumps(label, indent=1, ensure_ascii=False)).encode())

    def finish(self) -> None:
        pass


class _Cvat:
    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:
        self._file = stack.enter_context(replacing(folder / CVAT))
        labels = "".join(
            f"<label><name>{_escaped(one.name)}</name><attributes></attributes></label>"
            for one in about.classes
        )
        self._file.write(
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
            f"<meta><task><labels>{labels}</labels></task></meta>\n".encode()
        )
        self._count = 0

    def add(self, one: Prediction) -> None:
        width, height = one.size
        lines = [
            f'<image id="{self._count}" name={_quoted(one.name)} width="{width}" height="{height}">'
        ]
        self._count += 1
        found = one.detections
        for name, box in zip(found.names, found.boxes_xyxy.tolist(), strict=True):
            sides = zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)
            corners = " ".join(f'{side}="{_pixels(value)}"' for side, value in sides)
            lines.append(
                f'<box label={_quoted(name)} source="auto" occluded="0" {corners} z_order="0">'
                "</box>"
            )
        self._file.write("\n".join([*lines, "</image>\n"]).encode())

    def finish(self) -> None:
        self._file.write(b"</annotations>\n")


class _Images:
    """Drawn images; threads draw them, a few at a time."""

    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:
        self._files = _Files(folder / IMAGES)
        self._ahead = 2 * about.workers
        self._pool = ThreadPoolExecutor(max(1, about.workers), thread_name_prefix="draw")
        self._waiting: deque[Future[None]] = deque()
        stack.callback(self._pool.shutdown, cancel_futures=True)

    def add(self, one: Prediction) -> None:
        self._waiting.append(self._pool.submit(self._draw, one))
        while len(self._waiting) > self._ahead:
            self._waiting.popleft().result()

    def _draw(self, one: Prediction) -> None:
        assert one.picture is not None
        data = io.BytesIO()
        drawn = draw_detections(one.picture, one.detections)
        drawn.save(data, "JPEG", quality=_QUALITY)
        self._files.put(f"{one.stem}.jpg", data.getvalue())

    def finish(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()


class _Frames:
    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:  # noqa: ARG002
        self._files = _Files(folder / FRAMES)

    def add(self, one: Prediction) -> None:
        if one.frame is not None:
            self._files.put(one.name, one.frame)

    def finish(self) -> None:
        pass


class _Sheet:
    """Keeps each n-th image, and doubles n when that are too many."""

    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:  # noqa: ARG002
        self._path, self._about = folder / SHEET, about
        self._kept: list[tuple[int, SheetImage]] = []
        self._every, self._seen = 1, 0
        self._objects: Counter[int] = Counter()

    def add(self, one: Prediction) -> None:
        found = one.detections
        self._objects.update(found.labels.tolist())
        if self._seen % self._every == 0:
            assert one.picture is not None
            small = fitted(one.picture, _THUMBNAIL)
            self._kept.append(
                (
                    self._seen,
                    SheetImage(one.size, small.copy, label_fewer(detected_boxes(found), None)),
                )
            )
            if len(self._kept) >= 2 * SHEET_IMAGES:
                self._every *= 2
                self._kept = [pair for pair in self._kept if pair[0] % self._every == 0]
        self._seen += 1

    def finish(self) -> None:
        if not self._kept:
            return
        count = min(SHEET_IMAGES, len(self._kept))
        chosen = [self._kept[i * len(self._kept) // count][1] for i in range(count)]
        title = f" · {counted(f'{self._objects.total():,}', 'detection')}"
        classes = [
            (one.index, class_text(one.name, one.index))
            for one in self._about.classes
            if self._objects[one.index]
        ]
        draw_rows(self._path, self._seen, title, classes, self._objects, chosen)


_WRITERS: dict[str, Callable[[Path, About, ExitStack], Writer]] = {
    "json": _Coco,
    "results": _Results,
    "csv": _Csv,
    "yolo": _Yolo,
    "voc": _Voc,
    "labelme": _Labelme,
    "cvat": _Cvat,
    "images": _Images,
    "sheet": _Sheet,
    "frames": _Frames,
}


def write_skipped(folder: Path, rows: Iterator[tuple[str, str]]) -> None:
    """Write the list of what was skipped, and why."""
    with replacing(folder / SKIPPED) as file:
        file.write(_csv_rows([("file", "reason"), *rows]))


def _pixels(value: float) -> str:
    return f"{value:.2f}"


def _escaped(text: str) -> str:
    """Return a text for XML, which cannot hold control characters."""
    return saxutils.escape(_CONTROL.sub("", text))


def _quoted(text: str) -> str:
    return saxutils.quoteattr(_CONTROL.sub("", text))


def _yaml(text: str) -> str:
    """Quote a text for YAML, whose double quotes are those of JSON but for some characters."""
    quoted = json.dumps(as_utf8(text), ensure_ascii=False)
    return _YAML_ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _csv_rows(rows: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return as_utf8(text.getvalue()).encode()
