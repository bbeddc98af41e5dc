"""`runkey convert`: make a COCO data folder of YOLO or Pascal VOC labels, read by globox.

Labels and images belong together by their names, in whatever folders they lie. What cannot be read
is named line by line, and objects are counted before and after.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

from typer import Argument, Option

from runkey.cli import output
from runkey.cli.output import AsJson
from runkey.data.coco import is_hidden, split_in
from runkey.data.report import shortened
from runkey.errors import DataError, LockError, RunkeyError
from runkey.files import SMALL, FormatError, open_plain, read_plain, read_text, write_atomically
from runkey.progress import each, say
from runkey.units import counted

_PICTURE = re.compile(r"\.(jpe?g|jpe|jfif|mpo|png|bmp|tiff?|webp|gif|p[pgn]m|jp2)", re.IGNORECASE)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Names of lists of images, and keys of data.yaml."""
_USUAL = re.compile(r"(jpeg)?images?|img|data|labels?|annotations?|xmls?|txt", re.IGNORECASE)
"""Folders of images and folders of labels."""
_OVERHANG = 1.0
"""Pixels that a box may reach over its image and is not named: rounding."""
_SHOWN = 20
_ONE = {"images": "image", "objects": "object", "classes": "class"}


def convert(
    source: Annotated[Path, Argument(metavar="FROM", help="Folder of images and labels.")],
    target: Annotated[Path, Argument(metavar="TO", help="COCO folder to make.")],
    kind: Annotated[
        Literal["yolo", "voc"], Option("--format", help="yolo: text files; voc: Pascal VOC's XML.")
    ],
    drop: Annotated[bool, Option("--drop", help="Leave out what cannot be read.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a COCO folder of YOLO or Pascal VOC labels; needs `make env-convert`."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    if target.exists():
        raise DataError(f"{target}: is there already; name a new folder")
    labels = (_Yolo if kind == "yolo" else _Voc)(source, _globox())
    labels.read()
    if labels.faults:
        more = [f"... and {len(labels.faults) - _SHOWN} more"] if labels.faults[_SHOWN:] else []
        say(*(f"  {line}" for line in labels.faults[:_SHOWN] + more), stderr=True)
    if labels.faults and not drop:
        raise DataError(
            f"{source}: nothing is written; mend what is named above ({len(labels.faults)}), or "
            "leave it out with --drop"
        )
    splits = labels.splits()
    before = {"images": labels.pictures, "objects": labels.rows, "classes": len(labels.ids)}
    after = _write(splits, labels.ids, target)
    notes = labels.notes()
    for name in ("images", "objects"):
        if (lost := before[name] - sum(one[name] for one in after.values())) > 0:
            notes.append(f"left out: {counted(f'{lost:,}', _ONE[name])}")
    counts = {kind: before, **{f"COCO, {split}": one for split, one in after.items()}}
    width = max(map(len, counts))
    lines = [
        f"{what:<{width}}  {', '.join(counted(f'{n:,}', _ONE[name]) for name, n in one.items())}"
        for what, one in counts.items()
    ]
    lines += [f"note: {note}" for note in notes]
    lines.append(f"{target}/ is written: move it to data/, then `dvc add data`")
    answer = {"before": before, "after": after, "notes": notes, "faults": labels.faults}
    output.print_answer(answer, *lines, as_json=as_json)


def _globox() -> Any:
    """Return globox's class of boxes, from .venv-convert if this environment has no globox.

    That folder goes last: globox's own packages are those of this environment.
    """
    folders = map(str, output.workspace().glob(".venv-convert/lib/python3*/site-packages"))
    path = sys.path
    try:
        sys.path = [*path, *folders]
        from globox import BoundingBox
    except ImportError:
        text = "`runkey convert` needs globox, which is not installed; run `make env-convert`"
        raise LockError(text) from None
    finally:
        sys.path = path
    return BoundingBox


@dataclass(slots=True)
class _Image:
    path: Path
    size: tuple[int, int]
    """Width and height, pixels: of the file, or what its label says."""
    label: Path | None = None
    objects: list[tuple[str, list[float]]] = field(default_factory=list)
    """Class and box (xywh, pixels)."""


class _Labels:
    """The images of a folder and what its label files say about them."""

    suffix: str

    def __init__(self, source: Path, boxes: Any) -> None:
        self.source, self.boxes = source, boxes
        found = (path for path in sorted(source.rglob("*")) if path.is_file())
        self.files = [
            path for path in found if not any(map(is_hidden, path.relative_to(source).parts))
        ]
        self.images: dict[Path, _Image] = {}
        self.ids: dict[str, int] = {}
        """Category id of each class."""
        self.rows = 0
        """Objects in the label files, counted without parsing them."""
        self.faults: list[str] = []
        self.pictures = 0
        """Image files."""
        self._noted: dict[str, list[str]] = defaultdict(list)
        self._lists: list[tuple[str, Path]] = []
        """Split and file of the lists of images."""
        self._of_stem: dict[str, list[Path]] = defaultdict(list)
        self._of_split: dict[str, set[Path]] = defaultdict(set)

    def read(self) -> None:
        """Read the images' sizes, then all labels; what is wrong is in `faults`."""
        from PIL import Image

        from runkey.data.decode import FORMATS

        pictures = [path for path in self.files if _PICTURE.fullmatch(path.suffix)]
        for path in each("read images", pictures, "images"):
            try:
                with open_plain(path) as file, Image.open(file, formats=FORMATS) as image:
                    self.images[path] = _Image(path, image.size)
                self._of_stem[path.stem].append(path)
            except Exception as error:  # noqa: BLE001 - PIL raises almost any type on bad bytes
                self.fault(path, f"is no image that can be read ({type(error).__name__})")
        self.pictures = len(pictures)
        self._unique = len(self._of_stem) == len(self.images)
        if not pictures:
            raise DataError(f"{self.source}: no images")
        for path in each("read labels", self.labels(), "files"):
            try:
                self.read_label(path, read_plain(path, SMALL))
            except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
                self.fault(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")
        if not self.rows:
            raise DataError(f"{self.source}: no objects in {self.suffix} files; is --format right?")

    def labels(self) -> list[Path]:
        """Return the label files."""
        return [path for path in self.files if path.suffix.lower() == self.suffix]

    def read_label(self, path: Path, data: bytes) -> None:
        """Read the objects of a label file."""
        raise NotImplementedError

    def fault(self, path: Path, what: str) -> None:
        """Record what cannot be read."""
        self.faults.append(f"{shortened(str(path.relative_to(self.source)))}: {shortened(what)}")

    def note(self, what: str, item: str) -> None:
        """Record an item that is converted, or left out by the user's own lists."""
        self._noted[what].append(item)

    def notes(self) -> list[str]:
        """Return one line for each kind of note."""
        return [f"{what}: {len(i)}, such as {shortened(i[0])}" for what, i in self._noted.items()]

    def image_of(self, label: Path, name: str = "") -> _Image | None:
        """Return a label's image; if there is none, or one with another label, it is a fault.

        `name` is the image's, if the label says it.
        """
        same = self._of_stem.get(label.stem) or self._of_stem.get(PurePosixPath(name).stem, [])
        inside = label.relative_to(self.source).parent
        fits = [one for one in same if self._fit(inside, one.relative_to(self.source).parent)]
        fits = [one for one in fits if one.name == name] or fits
        image = self.images[fits[0]] if len(fits) == 1 else None
        if image is None:
            shown = ", ".join(str(one.relative_to(self.source)) for one in fits)
            self.fault(label, f"belongs to several images: {shown}" if fits else "has no image")
        elif image.label:
            self.fault(label, f"{image.path.name} has another label, {image.label.name}")
            return None
        else:
            image.label = label
        return image

    def _fit(self, label: Path, picture: Path) -> bool:
        """Return True if files of one name in these folders belong together.

        labels/cam1 and images/cam2 do not, if several images have that name.
        """
        if len({split_in(label), split_in(picture)} - {None}) > 1:
            return False
        differ = set(label.parts) ^ set(picture.parts)
        return self._unique or all(map(_USUAL.fullmatch, differ))

    def add(self, label: Path, where: str, image: _Image, name: str, read: Any) -> None:
        """Add the object that `read` makes a box of."""
        try:
            box = list(read().ltwh)
        except Exception as error:  # noqa: BLE001 - globox has its own, assertions and ValueError
            lines = str(error).splitlines() or [type(error).__name__]
            self.fault(label, f"{where}: {lines[0]}")
            return
        if not all(map(math.isfinite, box)):
            self.fault(label, f"{where}: box {box} is not finite")
            return
        left, top, width, height = box
        over = max(-left, -top, left + width - image.size[0], top + height - image.size[1])
        if over > _OVERHANG:
            item = f"{label.name}, {where}, by {over:.6g} pixels"
            self.note("boxes that reach over their image, which `prepare` checks", item)
        image.objects.append((name, box))

    def splits(self) -> dict[str, list[_Image]]:
        """Return the images of train, val and test, or of the whole if only one has any."""
        for path in self.files:
            # VOC has lists for other tasks in ImageSets/Layout and ImageSets/Segmentation.
            of_other_task = path.parts[-3:-2] == ("ImageSets",) and path.parent.name != "Main"
            if _is_list(path) and not of_other_task:
                self._lists.append((_SPLITS[path.stem], path))
        for split, path in dict.fromkeys(self._lists):
            for line in _text(path).splitlines():
                self._list(split, path, line.strip())
        if not self._of_split:
            for path in self.images:
                if said := split_in(path.relative_to(self.source).parent):
                    self._of_split[said].add(path)
        if not self._of_split["train"] or not (self._of_split["val"] | self._of_split["test"]):
            return {"all": list(self.images.values())}
        listed = set().union(*self._of_split.values())
        for path in self.images:
            if path not in listed:
                self.note("images in no split, left out", path.name)
        return {
            split: [image for path, image in self.images.items() if path in self._of_split[split]]
            for split in ("train", "val", "test")
            if self._of_split[split]
        }

    def _list(self, split: str, file: Path, line: str) -> None:
        """Take a line of a list of images: a path, or in Pascal VOC a name without suffix."""
        place = PurePosixPath(line.replace("\\", "/"))
        stem = place.stem if _PICTURE.fullmatch(place.suffix) else place.name
        same = self._of_stem.get(stem, [])
        most = max((_shared_end(place, one) for one in same), default=0)
        best = [one for one in same if _shared_end(place, one) == most]
        if len(best) == 1:
            self._of_split[split].add(best[0])
        elif line:
            self.note(f"listed in {file.name} but not there", line)


class _Yolo(_Labels):
    """Lines of `class cx cy w h` or of a polygon, as parts of the image's size."""

    suffix = ".txt"

    def labels(self) -> list[Path]:
        """Return the text files that are labels: beside their image, or of numbers."""
        self._names, self._has_keypoints = self._read_names()
        self.ids = {name: index for index, name in self._names.items()}
        return [
            path
            for path in super().labels()
            if (path.stem in self._of_stem and not _is_list(path)) or _has_numbers(path)
        ]

    def _read_names(self) -> tuple[dict[int, str], bool]:
        """Class names of data.yaml, else of classes.txt or *.names; True if there are keypoints."""
        found: dict[Path, tuple[dict[int, str], bool]] = {}
        for path in self.files:
            if path.suffix.lower() in (".yaml", ".yml"):
                settings = self._load(path)
                names = settings.get("names")
                if isinstance(names, list):
                    names = dict(enumerate(names))
                if isinstance(names, dict):
                    found[path] = (names, "kpt_shape" in settings)
        for path in [] if found else self.files:
            if path.name == "classes.txt" or path.suffix == ".names":
                lines = _text(path).rstrip().splitlines()
                found[path] = (dict(enumerate(map(str.strip, lines))), False)
        answers = list(found.values())
        if not answers or any(one != answers[0] for one in answers):
            shown = ", ".join(str(p.relative_to(self.source)) for p in found) or "none is there"
            raise DataError(f"{self.source}: one data.yaml or classes.txt is wanted; {shown}")
        names, keypoints = answers[0]
        twice = [name for name, number in Counter(map(str, names.values())).items() if number > 1]
        odd = [index for index in names if not isinstance(index, int)]
        if twice or odd:
            shown = f"class {twice[0]!r} twice" if twice else f"index {odd[0]!r}, no whole number"
            raise DataError(f"{next(iter(found))}: {shown} in `names`")
        return {index: str(name) for index, name in names.items()}, keypoints

    def _load(self, path: Path) -> dict[str, Any]:
        from runkey.params.load import parse_yaml

        try:
            settings = parse_yaml(read_text(path))
        except (FormatError, FileNotFoundError) as error:
            raise DataError(f"{path}: cannot be read ({error}); mend it") from None
        if not isinstance(settings, dict):
            return {}
        if "names" in settings:
            for key, split in _SPLITS.items():
                entries = settings.get(key)
                for entry in entries if isinstance(entries, list) else [entries]:
                    if isinstance(entry, str):
                        self._add_folder(split, PurePosixPath(entry.replace("\\", "/")))
        return settings

    def _add_folder(self, split: str, entry: PurePosixPath) -> None:
        """Assign the images of a folder, whose path may be another machine's, to a split."""
        for start in range(bool(entry.root), len(entry.parts)):
            folder = self.source.joinpath(*(part for part in entry.parts[start:] if part != ".."))
            if folder.is_file():
                self._lists.append((split, folder))
                return
            if folder.is_dir():
                self._of_split[split].update(p for p in self.images if folder in p.parents)
                return

    def read_label(self, path: Path, data: bytes) -> None:
        """Read the lines of a file."""
        lines = [line.split() for line in data.decode("utf-8-sig").splitlines()]
        self.rows += sum(1 for values in lines if values)
        image = self.image_of(path) if any(lines) else None
        for number, values in enumerate(lines if image else [], start=1):
            if not values or image is None:
                continue
            index = _whole(values[0])
            if index not in self._names:
                what = f"class {values[0]}, but the names are of {min(self._names)} to "
                self.fault(path, f"line {number}: {what}{max(self._names)}")
                continue
            values = values[:5] if self._has_keypoints else values
            read = self.boxes.from_yolo_v5 if len(values) < 7 else self.boxes.from_yolo_seg
            line = partial(read, " ".join(values), image_size=image.size)
            self.add(path, f"line {number}", image, self._names[index], line)


def _shared_end(one: PurePath, other: PurePath) -> int:
    """Return how many folders above the files are the same."""
    pairs = zip(reversed(one.parts[:-1]), reversed(other.parts[:-1]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _text(path: Path) -> str:
    return read_plain(path, SMALL).decode("utf-8-sig", errors="replace")


def _is_list(path: Path) -> bool:
    return path.suffix == ".txt" and path.stem in _SPLITS and not _has_numbers(path)


def _has_numbers(path: Path) -> bool:
    """Return True if a text begins like a label of YOLO."""
    with open_plain(path) as file:
        words = file.readline(200).split()
    return len(words) > 4 and _whole(words[0].decode("latin-1")) is not None


def _whole(text: str) -> int | None:
    """The number of a class; some tools write 1.0."""
    try:
        return int(float(text)) if float(text).is_integer() else None
    except (ValueError, OverflowError):
        return None


class _Voc(_Labels):
    """A file of XML for each image."""

    suffix = ".xml"

    def read_label(self, path: Path, data: bytes) -> None:
        """Read the objects of a file; the parts of an object (VOC 2007) are none."""
        root = ElementTree.fromstring(data)
        if root.tag != "annotation":
            raise ValueError(f"<{root.tag}> in place of <annotation>: no Pascal VOC")
        nodes = root.findall("object")
        self.rows += len(nodes)
        named = PurePosixPath((root.findtext("filename") or "").replace("\\", "/")).name
        image = self.image_of(path, named)
        if image is None:
            return
        size = [_whole(root.findtext(f"size/{side}") or "") or 0 for side in ("width", "height")]
        if min(size) > 0 and tuple(size) != image.size:
            # Boxes are in pixels of that size; prepare finds that the file has another one.
            stated, real = ("x".join(map(str, one)) for one in (size, image.size))
            self.note("labels of another size than their image's", f"{path.name}: {stated}, {real}")
            image.size = (size[0], size[1])
        for number, node in enumerate(nodes, start=1):
            name = (node.findtext("name") or "").strip()
            if not name:
                self.fault(path, f"object {number}: no name")
                continue
            if node.findtext("difficult", "0").strip() == "1":
                self.note("objects marked as difficult, now like others", path.name)
            self.add(path, f"object {number}", image, name, partial(self.boxes.from_xml, node))

    def splits(self) -> dict[str, list[_Image]]:
        """Number the classes by name, then split."""
        names = sorted({name for image in self.images.values() for name, _ in image.objects})
        self.ids = {name: number for number, name in enumerate(names, start=1)}
        return super().splits()


def _write(
    splits: dict[str, list[_Image]], ids: dict[str, int], target: Path
) -> dict[str, dict[str, int]]:
    """Write JSON files and copy images; count what the files then hold.

    Beside the target first, which a full disk or Ctrl-C leaves as it was: not there.
    """
    after = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        out = Path(folder) / "coco"
        (out / "annotations").mkdir(parents=True)
        try:
            for split, images in splits.items():
                base = Path(os.path.commonpath([image.path.parent for image in images]))
                path = out / f"annotations/instances_{split}.json"
                write_atomically(path, json.dumps(_coco(images, ids, base)))
                for image in each(f"copy {split}", images, "images"):
                    copy = out / "images" / split / image.path.relative_to(base)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(image.path, copy)
                written = json.loads(path.read_text(encoding="utf-8"))
                there = sum(one.is_file() for one in (out / "images" / split).rglob("*"))
                after[split] = {
                    "images": min(there, len(written["images"])),
                    "objects": len(written["annotations"]),
                    "classes": len(written["categories"]),
                }
            out.rename(target)
        except OSError as error:
            raise RunkeyError(f"{target}: cannot be written ({error.strerror})") from None
    return after


def _coco(images: list[_Image], ids: dict[str, int], base: Path) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    entries = []
    for number, image in enumerate(images, start=1):
        name = image.path.relative_to(base).as_posix()
        width, height = image.size
        entries.append({"id": number, "file_name": name, "width": width, "height": height})
        for label, box in image.objects:
            row = {"image_id": number, "category_id": ids[label], "bbox": box, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **row, "area": box[2] * box[3]})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}
