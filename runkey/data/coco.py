"""Find the JSON files of a COCO data set in the layouts that tools write, and read them.

A JSON of train and one of val, of test or of both, or one that `prepare` splits. Faults of single
entries are findings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast
from unicodedata import category, normalize

from runkey.data.index import ClassName, SplitName
from runkey.data.report import Findings, shortened
from runkey.errors import DataError
from runkey.files import LARGE, FormatError, read_text, unique

# Where a JSON may be, as glob patterns below the data folder.
_INSTANCES = ("annotations/instances*.json", "*/annotations/instances*.json")  # COCO, CVAT
_SHALLOW = ("annotations/*.json", "*.json")  # labelme2coco, Label Studio, FiftyOne, VIA
_DEEP = ("*/*.json", "*/annotations/*.json")  # Roboflow, FiftyOne by split, Supervisely
# Where its images may be: below the folder of the JSON or of its `annotations`, or the data folder,
# in a sub-folder (or one of its `images`) called like the JSON or the split, else in one of these.
_IMAGES = ("images", "img", "data")
_WORDS = {"train": r"train\d*", "val": r"(val|valid|validation)\d*", "test": r"test\d*"}
_SPLIT = re.compile(r"(?:.*[^a-z])?(train|val|test)", re.IGNORECASE)
_WANTED = "annotations/instances_train*.json with instances_val*.json, or one JSON to be split"
_MOST_LISTED = 8
# Target of DVC's links in a workspace: CACHE/files/md5/ab/<30 hex digits>; in DVC 2 CACHE/ab/...
_DVC_OBJECT = re.compile(r".*/[0-9a-f]{2}/[0-9a-f]{30}")
# What Label Studio puts before the names of uploaded files.
_UPLOAD = re.compile(r"[0-9a-f]{8}-")
# Control characters, line and paragraph separators, halves of surrogate pairs.
_NOT_IN_NAMES = frozenset(("Cc", "Zl", "Zp", "Cs"))
_INT64 = 2**63
_LISTS = ("images", "annotations", "categories")
_LISTED = "the lists images, annotations and categories"


@dataclass(frozen=True, slots=True)
class Source:
    """One JSON, and the folders that may hold its images."""

    split: SplitName | Literal["data"]
    """data: the data set has one JSON."""
    data: Path
    """The data folder."""
    json: Path
    shown_data: str
    """Names of folder and JSON in messages."""
    shown_json: str
    folders: tuple[str, ...]
    """Existing folders, relative to the data folder ("" is itself), in the order of search."""
    notes: tuple[str, ...]
    """What was chosen among several JSON files, one line each."""
    _composed: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    """Of each folder that was searched, the names by their composed Unicode form."""

    def show(self, file: str) -> str:
        """Return the name of a file of the data folder in messages."""
        return f"{self.shown_data}/{file}" if file else self.shown_data

    def find(self, name: str) -> str | None:
        """Return an image's path relative to the data folder; None if no folder has it.

        The Unicode form does not count: macOS writes "für.png" with a separate accent (NFD).
        """
        for folder in self.folders:
            file = f"{folder}/{name}" if folder else name
            # os.path: this runs for every image, and pathlib takes ten times as long.
            if os.path.isfile(f"{self.data}/{file}"):  # noqa: PTH113
                return file
        if name.isascii():
            return None
        found = (self._find_composed(folder, name) for folder in self.folders)
        return next((file for file in found if file), None)

    def _find_composed(self, folder: str, name: str) -> str | None:
        file = folder
        for part in name.split("/"):
            path = self.data / file
            if file not in self._composed:
                inside = sorted(path.iterdir()) if path.is_dir() else []
                self._composed[file] = {normalize("NFC", one.name): one.name for one in inside}
            found = self._composed[file].get(normalize("NFC", part))
            if found is None:
                return None
            file = f"{file}/{found}" if file else found
        return file if (self.data / file).is_file() else None

    def leaves(self, file: str) -> bool:
        """Return True if a link leads out of the data folder, other than into DVC's cache."""
        target = os.path.realpath(f"{self.data}/{file}")
        if target.startswith(f"{os.path.realpath(self.data)}{os.sep}"):
            return False
        return not _DVC_OBJECT.fullmatch(target.replace(os.sep, "/"))


def find_sources(data: Path, shown: str) -> list[Source]:
    """Find the JSON files of a data folder, called `shown` in messages: train and others, or one.

    Raises:
        DataError: there is no folder, no JSON, or more than one candidate.
    """
    if not data.is_dir():
        raise DataError(
            f"{shown}: no such folder; run `dvc pull data.dvc` or set data.path in params.yaml"
        )
    instances = _jsons(data, _INSTANCES)
    if found := _splits(data, shown, instances, one_each=False):
        return found
    shallow = _jsons(data, _SHALLOW)
    deep = [path for path in _jsons(data, _DEEP) if path not in shallow]
    upper, lower = (_splits(data, shown, paths, one_each=True) for paths in (shallow, deep))
    candidates = shallow or deep
    if lower and shallow:
        candidates = shallow + deep
    elif found := upper or lower:
        return found
    elif len(instances) == 1 and {path.parent for path in candidates} == {instances[0].parent}:
        rest = [path for path in candidates if path != instances[0]]  # of other tasks
        return [_source("data", data, shown, instances[0], _not_used(data, rest))]
    elif len(candidates) == 1:
        return [_source("data", data, shown, candidates[0])]
    if not candidates:
        raise DataError(
            f"{shown}: no annotations found; put there {_WANTED}; "
            "other layouts and formats: docs/your-data.md"
        )
    names = _names(data, candidates)
    raise DataError(f"{shown}: cannot tell which JSON to take ({names}); leave {_WANTED}")


def _jsons(data: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of some patterns, without those that macOS and editors hide."""
    found = [path for pattern in patterns for path in data.glob(pattern, case_sensitive=False)]
    return sorted(path for path in found if not any(map(is_hidden, path.relative_to(data).parts)))


def is_hidden(name: str) -> bool:
    """Return True for files and folders that macOS and editors put beside the user's."""
    return name.startswith(".") or name == "__MACOSX"


def _splits(data: Path, shown: str, paths: list[Path], *, one_each: bool) -> list[Source]:
    """Take the JSON of train, and those of val and test; [] if a split has none (or several).

    COCO's image_info_test*.json lists images without annotations: it is of no split.
    """
    of_split: dict[SplitName, list[Path]] = {"train": [], "val": [], "test": []}
    for path in paths:
        split = split_in(path.relative_to(data))
        if split and not path.stem.lower().startswith("image_info"):
            of_split[split].append(path)
    train, val, test = of_split.values()
    if not train or not (val or test):
        return []
    notes = []
    unclear = test[:] if val and len(test) > 1 else []
    if unclear:
        names = _names(data, unclear)
        notes.append(f"not used: {names}; to have a test split, leave one JSON of test")
        test.clear()
    if one_each and max(map(len, of_split.values())) > 1:
        return []
    for found in of_split.values():
        if len(found) > 1:
            raise DataError(
                f"{shown}/annotations: more than one JSON of a split ({_names(data, found)}); "
                "leave one of them"
            )
    if not val:
        what = f"{_names(data, train)} is split, as there is no JSON of val"
        notes.append(f"{what} (data.val_fraction)")
    used = [*train, *val, *test, *unclear]
    notes += _not_used(data, [path for path in paths if path not in used])
    return [
        _source(split, data, shown, found[0], notes if split == "train" else ())
        for split, found in of_split.items()
        if found
    ]


def _not_used(data: Path, paths: list[Path]) -> list[str]:
    return [f"not used: {_names(data, paths)}"] if paths else []


def split_in(path: Path) -> SplitName | None:
    """Return train, val or test, as a file's name says, else one of its folders'."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        if found := _SPLIT.match(part):
            return cast("SplitName", found[1].lower())
    return None


def _source(
    split: SplitName | Literal["data"],
    data: Path,
    shown: str,
    path: Path,
    notes: Sequence[str] = (),
) -> Source:
    beside = path.parent
    base = beside.parent if beside.name.lower() == "annotations" else beside
    # The image's own split first: train/1.jpg and val/1.jpg may be different images.
    said = split_in(path.relative_to(data)) or split
    words = [_WORDS[said]] if split != "data" else list(_WORDS.values())
    stem = path.stem
    names = [re.escape(stem[10:] if stem.lower().startswith("instances_") else stem), *words]
    tried = [folder for top in (base, data) for folder in _image_folders(top, names)]
    folders = dict.fromkeys(folder.relative_to(data).as_posix() for folder in (*tried, beside))
    inside = tuple("" if folder == "." else folder for folder in folders)
    shown_json = f"{shown}/{_names(data, [path])}"
    return Source(split, data, path, shown, shown_json, inside, tuple(notes))


def _image_folders(base: Path, names: list[str]) -> Iterator[Path]:
    """The folders below `base` that may hold images, and itself, in the order of search."""
    inside = _folders(base)
    for top in (*(folder for folder in inside if folder.name.lower() == "images"), base):
        below = inside if top == base else _folders(top)
        for name in names:
            matches = re.compile(name, re.IGNORECASE).fullmatch
            yield from (folder for folder in below if matches(folder.name))
    for name in _IMAGES:
        yield from (folder for folder in inside if folder.name.lower() == name)
    yield base


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
    except OSError as error:
        text = f"{folder}: cannot be read ({error.strerror}); give yourself the right to read it"
        raise DataError(text) from None
    return [folder / name for name in names]


def _names(data: Path, paths: list[Path]) -> str:
    names = [shortened(path.relative_to(data).as_posix()) for path in paths[:_MOST_LISTED]]
    more = [f"and {len(paths) - _MOST_LISTED} more"] if len(paths) > _MOST_LISTED else []
    return ", ".join(names + more)


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
    twin: int | None = None
    """Id of an earlier annotation of the same object; filled in by the checks."""


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
        return f"image {self.id} ({shortened(self.name)})"


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


def read_coco(source: Source, findings: Findings) -> Coco | None:
    """Read a COCO JSON; faults of single entries are findings.

    None for a JSON of test without annotations, such as a competition gives away: a note says so.

    Raises:
        DataError: it is no JSON object with the lists images, annotations and categories.
    """
    shown = source.shown_json
    raw = _parse(source.json, shown)
    if not isinstance(raw, dict):
        raise DataError(f"{shown}: not an object with {_LISTED}; export it as COCO detection")
    if source.split == "test" and not raw.get("annotations"):
        findings.notes.append(f"not used: {shown}: it has no annotations, so it is no test split")
        return None
    for name in _LISTS:
        if not isinstance(raw.get(name), list):
            raise DataError(f"{shown}: no list `{name}`; export it as COCO detection ({_LISTED})")
    for name in ("images", "categories"):
        if not raw[name]:
            raise DataError(f"{shown}: the list `{name}` is empty; export the data set again")
    categories = _categories(raw.pop("categories"), shown, findings)
    listed = {_integer(entry.get("id")) for entry in raw["images"] if isinstance(entry, dict)}
    images = _entries(raw, "images", _image, shown, findings)
    findings.notes += source.notes
    _cut_foreign_folders(source, images, findings)
    annotations = _entries(raw, "annotations", _annotation, shown, findings)
    return Coco(source, images, listed, annotations, categories)


def _cut_foreign_folders(source: Source, images: list[CocoImage], findings: Findings) -> None:
    """Take off the folders in front of the names, if no image is found with them.

    They are of the machine that exported: /home/me/set, ../../media/upload/1, https://host/bucket.
    """

    def is_found(names: list[list[str]]) -> bool:
        return any(".." not in name and source.find("/".join(name)) for name in names)

    names = [image.name.split("/") for image in images]
    if not names or is_found(names):
        return
    levels = zip(*(name[:-1] for name in names), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    uploaded = [[*name[:-1], _UPLOAD.sub("", name[-1], count=1)] for name in names]
    for written, form in ((names, ""), (uploaded, " and the 8 digits in front of them")):
        for start in (*range(len(shared) + 1), -1):
            cut = [name[start:] for name in written]
            # Two images never get one name, so that none is taken for another.
            if len(set(map(tuple, cut))) < len(cut) or not is_found(cut):
                continue
            for image, name in zip(images, cut, strict=True):
                image.name = "/".join(name)
            folders = f"the folders {'/'.join(shared[:start])}" if start > 0 else "their folders"
            what = f"file names are read without {shortened(folders)}{form}"
            findings.notes.append(f"{source.shown_json}: {what}")
            return


def merge_classes(parts: list[Coco], findings: Findings) -> list[ClassName]:
    """Merge the categories of the JSON files into classes 0..K-1, sorted by id.

    What the files disagree about is a finding.
    """
    merged: dict[int, str] = {}
    first: dict[int, str] = {}
    for part in parts:
        shown = part.source.shown_json
        for number, name in part.categories.items():
            first.setdefault(number, shown)
            if merged.setdefault(number, name) != name:
                what = (
                    f"category {number} is {shortened(name)}, but {shortened(merged[number])} "
                    f"in {first[number]}"
                )
                findings.refuse(shown, what, "give all splits the same categories")
    ids: dict[str, int] = {}
    for number, name in sorted(merged.items()):
        if ids.setdefault(name, number) != number:
            what = f"category name {shortened(name)} has the ids {ids[name]} and {number}"
            shown = parts[-1].source.shown_json
            findings.refuse(shown, what, "give every category one id and its own name")
    return [ClassName(index, number, merged[number]) for index, number in enumerate(sorted(merged))]


def _parse(path: Path, shown: str) -> Any:
    try:
        return json.loads(read_text(path, LARGE), object_pairs_hook=_without_segmentation)
    except json.JSONDecodeError as error:
        where = f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
    except RecursionError:
        where = "not JSON (nested too deeply)"
    except FormatError as error:
        where = f"not JSON ({error})"
    except OSError as error:
        where = f"cannot be read ({error.strerror})"
    except ValueError:
        where = "not JSON (a number of thousands of digits)"
    raise DataError(f"{shown}: {where}; mend the file or export it again")


def _without_segmentation(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Drop what takes nine tenths of COCO's memory."""
    entry = unique(pairs)
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
    # Of what is not printable, U+202F in a macOS screenshot's name and a Persian U+200C are legal.
    return (
        isinstance(value, str)
        and bool(value.strip())
        and (value.isprintable() or _NOT_IN_NAMES.isdisjoint(map(category, value)))
    )


def _integer(value: Any) -> int | None:
    """The value as an int if it is a whole number; 1.0 is one, "1" and true are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    number = int(value)
    return number if -_INT64 <= number < _INT64 else None


def _value(entry: dict[str, Any], name: str) -> str:
    return f"is {shortened(json.dumps(entry[name]))}" if name in entry else "is missing"
