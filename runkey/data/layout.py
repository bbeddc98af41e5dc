"""Find the JSON files and images of a COCO data set in its common layouts.

Either two JSON files, `annotations/instances_train*.json` and `annotations/instances_val*.json`,
or one JSON in annotations/ or in the data folder itself, which `prepare` splits.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runkey.errors import DataError

_INSTANCES = re.compile(r"instances_(train|val)(.*)\.json")
_DRIVE = re.compile(r"[A-Za-z]:")
# Target of DVC's links in a workspace: .../files/md5/ab/<the other 30 hex digits>.
_DVC_OBJECT = re.compile(r".*/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")


@dataclass(frozen=True, slots=True)
class Source:
    """One JSON, and the folders that may hold its images."""

    split: Literal["train", "val", "all"]
    """all: the data set has one JSON and is split by `data.val_fraction`."""
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
    in_annotations = sorted((data / "annotations").glob("*.json"))
    named = [(_INSTANCES.fullmatch(path.name), path) for path in in_annotations]
    train, val = (
        [path for match, path in named if match and match[1] == split] for split in ("train", "val")
    )
    for paths in (train, val):
        if len(paths) > 1:
            raise DataError(
                f"{shown}/annotations: more than one JSON of a split ({_names(data, paths)}); "
                "leave one of them"
            )
    if train and val:
        return [_source("train", data, shown, train[0]), _source("val", data, shown, val[0])]
    candidates = in_annotations + sorted(data.glob("*.json"))
    if len(candidates) == 1:
        return [_source("all", data, shown, candidates[0])]
    wanted = "annotations/instances_train*.json with instances_val*.json, or one JSON to be split"
    if not candidates:
        raise DataError(f"{shown}: no annotations found; put there {wanted}")
    names = _names(data, candidates)
    raise DataError(f"{shown}: cannot tell which JSON to take ({names}); leave {wanted}")


def path_fault(name: str) -> str | None:
    """Return why an image's file name (with forward slashes) is unsafe; None if it is safe."""
    if name.startswith("/") or _DRIVE.match(name):
        return "is an absolute path"
    if ".." in name.split("/"):
        return "has `..` in it"
    return None


def _source(split: Literal["train", "val", "all"], data: Path, shown: str, path: Path) -> Source:
    match = _INSTANCES.fullmatch(path.name)
    # The image's own split first: train/1.jpg and val/1.jpg may be different images.
    names: list[str] = []
    for part in (split,) if split != "all" else ("train", "val"):
        if match and match[1] == part:
            names.append(part + match[2])
        names += [part, *sorted(p.name for p in data.glob(f"{part}[0-9]*"))]
        names += sorted(p.name for p in data.glob(f"images/{part}[0-9]*"))
    beside = path.parent.relative_to(data).as_posix()
    tried = [f"images/{n}" for n in names] + names + ["images", "", "" if beside == "." else beside]
    folders = tuple(f for f in dict.fromkeys(tried) if (data / f).is_dir())
    return Source(split, data, path, shown, f"{shown}/{_names(data, [path])}", folders)


def _names(data: Path, paths: list[Path]) -> str:
    return ", ".join(path.relative_to(data).as_posix() for path in paths)
