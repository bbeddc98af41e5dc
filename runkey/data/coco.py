"""Find the JSON files of a COCO data set in its common layouts, and read them into typed entries.

Either `annotations/instances_train*.json` and `annotations/instances_val*.json`, or one JSON there
or in the data folder itself, which `prepare` splits. Faults of single entries are findings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from runkey.data.index import ClassName
from runkey.data.report import Findings, escaped
from runkey.errors import DataError

# Target of DVC's links in a workspace: .../files/md5/ab/<the other 30 hex digits>.
_DVC_OBJECT = re.compile(r".*/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")
_INT64 = 2**63
_LISTS = ("images", "annotations", "categories")
_LISTED = "the lists images, annotations and categories"


@dataclass(frozen=True, slots=True)
class Source:
    """One JSON, and the folders that may hold its images."""

    split: Literal["train", "val", "data"]
    """data: the data set has one JSON and is split by `data.val_fraction`."""
    data: Path
    """The data folder."""
    json: Path
    shown_data: str
    """Names of folder and JSON in messages."""
    shown_json: str
    folders: tuple[str, ...]
    """Existing folders, relative to the data folder ("" is itself), in the order of search."""

    def show(self, file: str) -> str:
        """Return the name of a file of the data folder in messages."""
        return f"{self.shown_data}/{file}" if file else self.shown_data

    def find(self, name: str) -> str | None:
        """Return an image's path relative to the data folder; None if no folder has it."""
        for folder in self.folders:
            file = f"{folder}/{name}" if folder else name
            # os.path: this runs for every image, and pathlib takes ten times as long.
            if os.path.isfile(f"{self.data}/{file}"):  # noqa: PTH113
                return file
        return None

    def leaves(self, file: str) -> bool:
        """Return True if a link leads out of the data folder, other than into DVC's cache."""
        target = os.path.realpath(f"{self.data}/{file}")
        if target.startswith(f"{os.path.realpath(self.data)}{os.sep}"):
            return False
        return not _DVC_OBJECT.fullmatch(target.replace(os.sep, "/"))


def find_sources(data: Path, shown: str) -> list[Source]:
    """Find the JSON files of a data folder, called `shown` in messages: train and val, or one.

    Raises:
        DataError: there is no folder, no JSON, or more than one candidate.
    """
    if not data.is_dir():
        raise DataError(
            f"{shown}: no such folder; run `dvc pull data.dvc` or set data.path in params.yaml"
        )
    annotations = data / "annotations"
    train, val = (sorted(annotations.glob(f"instances_{part}*.json")) for part in ("train", "val"))
    for paths in (train, val):
        if len(paths) > 1:
            raise DataError(
                f"{shown}/annotations: more than one JSON of a split ({_names(data, paths)}); "
                "leave one of them"
            )
    if train and val:
        return [_source("train", data, shown, train[0]), _source("val", data, shown, val[0])]
    candidates = sorted(annotations.glob("*.json")) + sorted(data.glob("*.json"))
    if len(candidates) == 1:
        return [_source("data", data, shown, candidates[0])]
    wanted = "annotations/instances_train*.json with instances_val*.json, or one JSON to be split"
    if not candidates:
        raise DataError(f"{shown}: no annotations found; put there {wanted}")
    names = _names(data, candidates)
    raise DataError(f"{shown}: cannot tell which JSON to take ({names}); leave {wanted}")


def _source(split: Literal["train", "val", "data"], data: Path, shown: str, path: Path) -> Source:
    # The image's own split first: train/1.jpg and val/1.jpg may be different images.
    names: list[str] = []
    for part in (split,) if split != "data" else ("train", "val"):
        if path.name.startswith(f"instances_{part}"):
            names.append(path.stem.removeprefix("instances_"))
        names += [part, *sorted(p.name for p in data.glob(f"{part}[0-9]*"))]
        names += sorted(p.name for p in data.glob(f"images/{part}[0-9]*"))
    beside = path.parent.relative_to(data).as_posix()
    tried = [f"images/{n}" for n in names] + names + ["images", "", "" if beside == "." else beside]
    folders = tuple(f for f in dict.fromkeys(tried) if (data / f).is_dir())
    return Source(split, data, path, shown, f"{shown}/{_names(data, [path])}", folders)


def _names(data: Path, paths: list[Path]) -> str:
    return ", ".join(path.relative_to(data).as_posix() for path in paths)


@dataclass(slots=True)
class CocoAnnotation:
    """An entry of `annotations`; the box is not checked yet."""

    id: int
    image_id: int
    category_id: int
    bbox: list[Any]
    """xywh: four values of any type."""
    area: Any
    """None if the JSON has none."""
    crowd: bool


@dataclass(slots=True)
class CocoImage:
    """An entry of `images`."""

    id: int
    name: str
    """file_name of the JSON, with forward slashes."""
    width: int
    """Pixels."""
    height: int
    file: str = ""
    """Relative to the data folder, with forward slashes; filled in by the checks."""
    annotations: list[CocoAnnotation] = field(default_factory=list)
    """Filled in by the checks."""

    @property
    def item(self) -> str:
        """Return its name in messages."""
        return f"image {self.id} ({escaped(self.name)})"


@dataclass(slots=True)
class Coco:
    """The entries of one JSON."""

    source: Source
    images: list[CocoImage]
    listed: set[int | None]
    """Ids of all entries of `images`, including malformed ones; None: not a whole number."""
    annotations: list[CocoAnnotation]
    categories: dict[int, str]
    """Name of each category id."""


def read_coco(source: Source, findings: Findings) -> Coco:
    """Read a COCO JSON; faults of single entries are findings.

    Raises:
        DataError: it is no JSON object with the lists images, annotations and categories.
    """
    shown = source.shown_json
    raw = _parse(source.json, shown)
    if not isinstance(raw, dict):
        raise DataError(f"{shown}: not an object with {_LISTED}; export it as COCO detection")
    for name in _LISTS:
        if not isinstance(raw.get(name), list):
            raise DataError(f"{shown}: no list `{name}`; export it as COCO detection ({_LISTED})")
    for name in ("images", "categories"):
        if not raw[name]:
            raise DataError(f"{shown}: the list `{name}` is empty; export the data set again")
    categories = _categories(raw.pop("categories"), shown, findings)
    listed = {_integer(entry.get("id")) for entry in raw["images"] if isinstance(entry, dict)}
    images = _entries(raw, "images", _image, shown, findings)
    annotations = _entries(raw, "annotations", _annotation, shown, findings)
    return Coco(source, images, listed, annotations, categories)


def merge_classes(parts: list[Coco], findings: Findings) -> list[ClassName]:
    """Merge the categories of one or two JSON files into classes 0..K-1, sorted by id.

    What the files disagree about is a finding.
    """
    first, last = parts[0].source.shown_json, parts[-1].source.shown_json
    merged: dict[int, str] = {}
    for part in parts:
        for number, name in part.categories.items():
            if merged.setdefault(number, name) != name:
                what = (
                    f"category {number} is {escaped(name)}, but {escaped(merged[number])} "
                    f"in {first}"
                )
                findings.refuse(last, what, "give train and val the same categories")
    ids: dict[str, int] = {}
    for number, name in sorted(merged.items()):
        if ids.setdefault(name, number) != number:
            what = f"category name {escaped(name)} has the ids {ids[name]} and {number}"
            findings.refuse(last, what, "give every category one id and its own name")
    return [ClassName(index, number, merged[number]) for index, number in enumerate(sorted(merged))]


def _parse(path: Path, shown: str) -> Any:
    try:
        return json.loads(_text(path), object_hook=_without_segmentation)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not UTF-8"
    except RecursionError:
        where = "nested too deeply"
    except ValueError:
        where = "a number of thousands of digits"
    except OSError as error:
        raise DataError(f"{shown}: cannot be read ({error.strerror}); mend the file") from None
    raise DataError(f"{shown}: not JSON ({where}); mend the file or export it again")


def _text(path: Path) -> str:
    """The text of a JSON in UTF-8, 16 or 32; a function, so that its bytes (450 MB) are freed."""
    content = path.read_bytes()
    return content.decode(json.detect_encoding(content))


def _without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop what takes nine tenths of COCO's memory."""
    entry.pop("segmentation", None)
    return entry


def _categories(entries: list[Any], shown: str, findings: Findings) -> dict[int, str]:
    categories: dict[int, str] = {}
    for position, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {}
        number, name = _integer(fields.get("id")), fields.get("name")
        if number is None:
            fault = f"categories[{position}]: id {_value(fields, 'id')}"
        elif not _is_name(name):
            fault = f"category {number}: name {_value(fields, 'name')}"
        elif number in categories:
            fault = f"category {number} ({name}) is listed twice"
        else:
            categories[number] = name
            continue
        findings.refuse(shown, fault, "give every category an integer id and a name of its own")
    return categories


def _entries[T](
    raw: dict[str, Any],
    place: str,
    read: Callable[[dict[str, Any]], T],
    shown: str,
    findings: Findings,
) -> list[T]:
    """Take a list out of the JSON, and read its entries; those that are malformed are findings."""
    good: list[T] = []
    for position, entry in enumerate(raw.pop(place)):
        fields = entry if isinstance(entry, dict) else {}
        try:
            good.append(read(fields))
        except _EntryError as error:
            number = _integer(fields.get("id"))
            of_image = place == "images"
            findings.add(
                f"malformed_{place[:-1]}",
                shown,
                f"{place}[{position}]{'' if number is None else f' (id {number})'}: {error}",
                image_id=number if of_image else _integer(fields.get("image_id")),
                annotation_id=None if of_image else number,
            )
    return good


class _EntryError(ValueError):
    """A field is missing or of a wrong type."""


def _image(entry: dict[str, Any]) -> CocoImage:
    number = _wanted(entry, "id")
    name = entry.get("file_name")
    if not _is_name(name):
        raise _EntryError(f"file_name {_value(entry, 'file_name')}, a file's name is wanted")
    width, height = _wanted(entry, "width"), _wanted(entry, "height")
    if width < 1 or height < 1:
        raise _EntryError(f"width {width} and height {height}, positive numbers are wanted")
    return CocoImage(number, name.replace("\\", "/"), width, height)


def _annotation(entry: dict[str, Any]) -> CocoAnnotation:
    number = _wanted(entry, "id")
    image, category = _wanted(entry, "image_id"), _wanted(entry, "category_id")
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise _EntryError(f"bbox {_value(entry, 'bbox')}, [left, top, width, height] is wanted")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise _EntryError(f"iscrowd {_value(entry, 'iscrowd')}, 0 or 1 is wanted")
    return CocoAnnotation(number, image, category, bbox, entry.get("area"), bool(crowd))


def _wanted(entry: dict[str, Any], name: str) -> int:
    number = _integer(entry.get(name))
    if number is None:
        raise _EntryError(f"{name} {_value(entry, name)}, a whole number is wanted")
    return number


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _integer(value: Any) -> int | None:
    """The value as an int if it is a whole number; 1.0 is one, "1" and true are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    number = int(value)
    return number if -_INT64 <= number < _INT64 else None


def _value(entry: dict[str, Any], name: str) -> str:
    return f"is {escaped(json.dumps(entry[name]))}" if name in entry else "is missing"
