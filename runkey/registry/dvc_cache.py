"""Read DVC's cache as files, without DVC; download files of a run.

    <cache>/runs/<ab>/<hash of the stage>/<hash of all>   inputs and outputs of a stage, as YAML
    <cache>/files/md5/<ab>/<the other 30 digits>          a file by its md5
    <cache>/files/md5/<ab>/<...>.dir                      a folder: JSON list of {md5, relpath}

DVC keeps the objects of all outputs of an entry, also of those with `cache: false`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache, cached_property, partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from runkey.errors import RegistryError
from runkey.files import open_plain
from runkey.hashing import hash_stream, sha256_file
from runkey.identity.dvc_yaml import (
    DIR,
    MD5,
    cache_folder,
    md5s,
    read_folder_list,
    read_yaml_text,
)
from runkey.identity.record import Record, StoredFile
from runkey.paths import INITIAL_WEIGHTS, RUN_JSON
from runkey.progress import progress
from runkey.registry.library import Library, NotStoredError, inside


def download(library: Library, record: Record, paths: Iterable[str], target: Path) -> None:
    """Copy artifacts of a run into a folder, all of them or none.

    They are written to a temporary folder, hashed on the way, and moved only when all are right.
    Files in `target` of the same name are replaced.

    Raises:
        RegistryError: a file is not recorded, missing, or not what was recorded; the text names it
            and the run.
    """
    chosen = {path: _recorded(record, path) for path in paths}
    if target.exists() and not target.is_dir():
        raise RegistryError(f"{target}: a file, and a folder is wanted; name another one")
    total = sum(stored.size for stored in chosen.values())
    try:
        target.mkdir(parents=True, exist_ok=True)
        with (
            TemporaryDirectory(prefix=".runkey-", dir=target, ignore_cleanup_errors=True) as folder,
            progress("get", total, "bytes") as steps,
        ):
            waiting = {path: Path(folder, str(number)) for number, path in enumerate(chosen)}
            for path, stored in chosen.items():
                with library.open_file(record, path) as source, waiting[path].open("wb") as copy:
                    size, digest = hash_stream(source, copy, partial(steps.advance, text=path))
                if (size, digest) != (stored.size, stored.sha256):
                    raise RegistryError(
                        f"{record.label}: {path}: not what run {record.run.run_id} recorded"
                        f" ({size} bytes, sha256 {digest[:12]}; recorded {stored.size},"
                        f" {stored.sha256[:12]}); `runkey verify {record.label}` says what else is"
                        " wrong"
                    )
            for path, file in waiting.items():
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                file.replace(target / path)
    except OSError as error:
        raise RegistryError(f"{error.filename or target}: {error.strerror or error}") from None
    except HTTPException as error:
        raise RegistryError(f"{library.place}: the connection broke ({error!r})") from None


def pointer_md5(library: Library, record: Record) -> str | None:
    """Return the md5 of a run's run.json, by which DVC's entry of the run is found.

    Of a run that DVC did not start, the file itself tells it: DVC has it since `dvc repro` took the
    run, or `dvc commit` its outputs. None: the run has no such file.
    """
    if record.details and record.details.pointer_md5:
        return record.details.pointer_md5
    try:
        with library.open_file(record, RUN_JSON.as_posix()) as file:
            return hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
    except NotStoredError:
        return None


def in_the_way(record: Record, paths: Iterable[str], target: Path) -> list[str]:
    """List those of the paths that exist in the folder with other content."""
    places = {target / path: (path, _recorded(record, path).sha256) for path in paths}
    return [
        path
        for place, (path, sha256) in places.items()
        if os.path.lexists(place) and not (place.is_file() and sha256_file(place) == sha256)
    ]


def _recorded(record: Record, path: str) -> StoredFile:
    stored = record.details.files.get(path) if record.details else None
    if stored is None:
        raise RegistryError(f"{record.label}: {path}: run {record.run.run_id} records no such file")
    inside(record, path)
    return stored


_ITEM = re.compile(rf"^- path: (.+)\n(?:  .*\n)*?  md5: ({MD5.pattern})$", re.MULTILINE)

Items = set[tuple[str, str]]
"""Path and md5 of inputs or outputs."""


class Entry(NamedTuple):
    """An entry of DVC's run-cache: the inputs and outputs of a stage that ran, md5 by path."""

    path: str
    """Of its file, with `/`, relative to the cache's runs/."""
    deps: Mapping[str, str]
    outs: Mapping[str, str]
    """With metrics and plots."""


class DvcCache:
    """The cache of one checkout; its entries are read once."""

    def __init__(self, root: Path) -> None:
        """Args: root: the checkout, a git worktree too; its DVC settings say where the cache is."""
        self.folder = cache_folder(root)
        """Holds `runs/` and `files/md5/`; need not exist."""
        self.runs = self.folder / "runs"
        """The folder of the entries."""

    def object_path(self, md5: str) -> Path:
        """Return where the object of an md5 lies, or would lie."""
        return self.folder / "files" / "md5" / md5[:2] / md5[2:]

    def entry_of(self, pointer_md5: str) -> Entry | None:
        """Find the entry of the stage that wrote a file, such as a run's run.json."""
        parsed = map(self._parse, reversed(self._writers.get(pointer_md5, ())))
        return next((entry for entry in parsed if entry), None)

    def naming(self, md5: str) -> list[str]:
        """List the paths of the entries that have an md5 among their inputs or outputs."""
        return [
            path
            for path, (deps, outs) in self._scanned.items()
            if any(found == md5 for _, found in deps | outs)
        ]

    def chain(self, entry: Entry) -> list[Entry]:
        """List the entries before one, itself, and those after it, also those linked indirectly."""
        before, after = linked(entry.path, self._scanned, self.listing)
        parsed = map(self._parse, [*reversed(before), entry.path, *after])
        return [one for one in parsed if one]

    def listing(self, md5: str) -> dict[str, str]:
        """Return the md5 by path of the files in a folder; none where its object is no list."""
        return read_folder_list(self.object_path(md5), md5) or {}

    @cached_property
    def _scanned(self) -> dict[str, tuple[Items, Items]]:
        """Inputs and outputs of each entry by its path; 50 times as fast as parsing all."""
        found = {}
        for file in self.runs.glob("*/*/*"):
            with suppress(OSError):  # a temporary file of DVC, or deleted meanwhile
                deps, _, outs = file.read_text("utf-8", "replace").partition("\nouts:\n")
                items = _without_links(_ITEM.findall(deps)), set(_ITEM.findall(outs))
                found[file.relative_to(self.runs).as_posix()] = items
        return found

    @cached_property
    def _writers(self) -> dict[str, list[str]]:
        """Paths of the entries that have an output, by the output's md5; some may be torn."""
        found: dict[str, list[str]] = {}
        for path, (_, outs) in self._scanned.items():
            for _, md5 in outs:
                found.setdefault(md5, []).append(path)
        return found

    def _parse(self, path: str) -> Entry | None:
        """The entry in a file; None if it is torn (DVC ignores it then, too)."""
        try:
            tree = read_yaml_text(self.runs / path)
            deps = _without_links(md5s(tree.get("deps") or (), "path").items())
            return Entry(path, dict(deps), md5s(tree["outs"], "path"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _without_links(deps: Iterable[tuple[str, str]]) -> Items:
    """Leave out the links to initial weights, whose hash is a parameter of the key."""
    return {(path, md5) for path, md5 in deps if path != INITIAL_WEIGHTS.name}


def linked(
    start: str,
    entries: Mapping[str, tuple[Items, Items]],
    listing: Callable[[str], Mapping[str, str]],
) -> tuple[list[str], list[str]]:
    """Find the entries whose outputs one reads, and those that read its outputs, nearest first.

    `entries` holds inputs and outputs by path; those that are linked indirectly are found, too.
    """

    @cache
    def given(path: str) -> Items:
        """The outputs of an entry, and the files in those that are folders."""
        outs = entries[path][1]
        return outs | set(files_of(dict(outs), listing).items())

    def walk(is_near: Callable[[str, str], bool]) -> list[str]:
        found = [start]
        for known in found:  # grows: nearest first
            found += [path for path in entries if path not in found and is_near(path, known)]
        return found[1:]

    return (
        walk(lambda path, known: not given(path).isdisjoint(entries[known][0])),
        walk(lambda path, known: not given(known).isdisjoint(entries[path][0])),
    )


def files_of(
    outs: Mapping[str, str], listing: Callable[[str], Mapping[str, str]]
) -> dict[str, str]:
    """Return the md5 by path of every object of some outputs; a folder's path ends in `/`.

    `listing` gives the md5 by path of the files in a folder, such as `DvcCache.listing`.
    """
    found: dict[str, str] = {}
    for out, md5 in outs.items():
        if not md5.endswith(DIR):
            found[out] = md5
            continue
        found[f"{out}/"] = md5
        found |= {f"{out}/{path}": inner for path, inner in listing(md5).items()}
    return found


def md5_file(path: Path) -> str:
    """Return the hex md5 of a file's bytes, as DVC names it."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
