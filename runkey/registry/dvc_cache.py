"""Read DVC's cache as files, without DVC; download files of a run.

    <cache>/runs/<ab>/<hash of the stage>/<hash of all>   inputs and outputs of a stage, as YAML
    <cache>/files/md5/<ab>/<the other 30 digits>          a file by its md5
    <cache>/files/md5/<ab>/<...>.dir                      a folder: JSON list of {md5, relpath}

A run is found by the md5 of its run.json, which is an output of its stage. DVC keeps the objects
of all outputs of an entry, also of those with `cache: false`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runkey.errors import RegistryError
from runkey.hashing import hash_stream, sha256_file
from runkey.identity.dvc_yaml import cache_folder, covers, read_yaml_text
from runkey.identity.record import Record, StoredFile
from runkey.progress import progress
from runkey.registry.library import Library, inside


def download(library: Library, record: Record, paths: Iterable[str], target: Path) -> None:
    """Copy artifacts of a run into a folder, all of them or none.

    They are written to a temporary folder, hashed on the way, and moved only when all are right.
    Files in `target` of the same name are replaced.

    Raises:
        RegistryError: a file is not recorded, missing, or not what was recorded; the text names it
            and the run.
    """
    chosen = {path: _recorded(record, path) for path in paths}
    total = sum(stored.size for stored in chosen.values())
    target.mkdir(parents=True, exist_ok=True)
    temporary = TemporaryDirectory(prefix=".runkey-", dir=target, ignore_cleanup_errors=True)
    try:
        with temporary as folder, progress("get", total, "bytes") as steps:
            waiting = [Path(folder) / str(number) for number in range(len(chosen))]
            for file, (path, stored) in zip(waiting, chosen.items(), strict=True):
                with library.open_file(record, path) as source, file.open("wb") as copy:
                    size, digest = hash_stream(source, copy, partial(steps.advance, text=path))
                if (size, digest) != (stored.size, stored.sha256):
                    raise RegistryError(
                        f"{record.label}: {path}: not what run {record.run.run_id} recorded"
                        f" ({size} bytes, sha256 {digest[:12]}; recorded {stored.size},"
                        f" {stored.sha256[:12]}); `runkey verify {record.label}` says what else is"
                        " wrong"
                    )
            for file, path in zip(waiting, chosen, strict=True):
                place = target / inside(record, path)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    except OSError as error:
        raise RegistryError(f"{error.filename or target}: {error.strerror or error}") from None
    except HTTPException as error:
        raise RegistryError(f"{library.place}: the connection broke ({error!r})") from None


def in_the_way(record: Record, paths: Iterable[str], target: Path) -> list[str]:
    """List those of the paths that exist in the folder with other content."""
    wanted = {path: _recorded(record, path) for path in paths}
    return [
        path
        for path, stored in wanted.items()
        if os.path.lexists(target / path)
        and not ((target / path).is_file() and sha256_file(target / path) == stored.sha256)
    ]


def _recorded(record: Record, path: str) -> StoredFile:
    stored = record.details.files.get(path) if record.details else None
    if stored is None:
        raise RegistryError(f"{record.label}: {path}: run {record.run.run_id} records no such file")
    inside(record, path)
    return stored


DIR = ".dir"
"""End of the md5 of a folder."""
_OUTS = b"\nouts:\n"
_OUT = re.compile(rb"^- path: (.+)\n(?:  .*\n)*?  md5: ([0-9a-f]{32}(?:\.dir)?)$", re.MULTILINE)
MD5 = re.compile(r"[0-9a-f]{32}(?:\.dir)?")


@dataclass(frozen=True)
class Entry:
    """An entry of DVC's run-cache: a stage, its inputs and its outputs."""

    path: str
    """Of its file, with `/`, relative to the cache's runs/."""
    cmd: str
    deps: Mapping[str, str]
    """md5 by path; a folder's ends with `.dir`."""
    outs: Mapping[str, str]
    """Likewise, with metrics and plots."""


class DvcCache:
    """The cache of one checkout."""

    def __init__(self, root: Path) -> None:
        """Args: root: the checkout, a git worktree too; its DVC settings say where the cache is."""
        self.root = root
        self.folder = cache_folder(root)
        """Holds `runs/` and `files/md5/`; need not exist."""

    @property
    def runs(self) -> Path:
        """The folder of the entries."""
        return self.folder / "runs"

    def object_path(self, md5: str) -> Path:
        """Return where the object of an md5 lies, or would lie."""
        return self.folder / "files" / "md5" / md5[:2] / md5[2:]

    def entry_of(self, pointer_md5: str) -> Entry | None:
        """Find the entry of the stage that wrote a file, such as a run's run.json."""
        return self.entries_of([pointer_md5]).get(pointer_md5)

    def entries_of(self, pointer_md5s: Iterable[str]) -> dict[str, Entry]:
        """Find the entries for several files in one search, by md5."""
        wanted = {md5.encode() for md5 in pointer_md5s}
        found: dict[str, Entry] = {}
        for path, data in self._entries():
            outs = data.partition(_OUTS)[2] if wanted else b""
            for md5 in wanted.intersection(word for _, word in _OUT.findall(outs)):
                entry = self._parse(path)
                if entry and md5.decode() in entry.outs.values():
                    found[md5.decode()] = entry
        return found

    def chain(self, entry: Entry) -> list[Entry]:
        """List the entries before one, itself, and those after it, also those linked indirectly."""
        before, after = self._follow(entry, self._producers), self._follow(entry, self._consumers)
        return [*reversed(before), entry, *after]

    def files(self, outs: Mapping[str, str]) -> dict[str, str]:
        """Return the md5 by path of every object of some outputs; a folder's path ends in `/`.

        Files of a folder whose own object is missing or torn are unknown and left out.
        """
        found: dict[str, str] = {}
        for out, md5 in outs.items():
            found[f"{out}/" if md5.endswith(DIR) else out] = md5
            found |= {f"{out}/{path}": inner for path, inner in self._listing(md5).items()}
        return found

    def _listing(self, md5: str) -> dict[str, str]:
        """md5 by path of the files in a folder; {} for a file, and where the object is no list."""
        if not md5.endswith(DIR):
            return {}
        try:
            items = json.loads(self.object_path(md5).read_bytes())
            listed = {str(item["relpath"]): str(item["md5"]) for item in items}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        # Anything but an md5 must not become a path in the cache.
        return {path: inner for path, inner in listed.items() if MD5.fullmatch(inner)}

    def _entries(self) -> Iterator[tuple[str, bytes]]:
        """Path and bytes of every entry; searching bytes is 50 times as fast as parsing."""
        for file in self.runs.glob("*/*/*"):
            try:
                data = file.read_bytes()
            except OSError:  # a temporary file of DVC, or deleted meanwhile
                continue
            yield file.relative_to(self.runs).as_posix(), data

    def _parse(self, path: str) -> Entry | None:
        """The entry in a file; None if it is torn (DVC ignores it then, too)."""
        try:
            tree = read_yaml_text(self.runs / path)
            return Entry(path, tree["cmd"], _md5s(tree.get("deps")), _md5s(tree["outs"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _follow(self, entry: Entry, near: Callable[[list[Entry]], list[Entry]]) -> list[Entry]:
        """Entries linked to one, directly and indirectly, nearest first."""
        found: dict[str, Entry] = {}
        newest = [entry]
        while newest:
            newest = [e for e in near(newest) if e.path not in found and e.path != entry.path]
            found |= {e.path: e for e in newest}
        return list(found.values())

    def _producers(self, entries: list[Entry]) -> list[Entry]:
        """The entries of stages whose outputs are inputs of some entries."""
        deps = {(path, md5) for entry in entries for path, md5 in entry.deps.items()}

        @cache  # the same outputs are in many entries
        def is_needed(out: tuple[bytes, bytes]) -> bool:
            """Return True if an output is a dependency, or a folder that holds one."""
            folder, md5 = out[0].decode(errors="replace"), out[1].decode()
            inside = {(p, m) for p, m in deps if p != folder and covers(folder, p)}
            listed = self._listing(md5).items() if inside else ()
            return (folder, md5) in deps or any((f"{folder}/{p}", m) in inside for p, m in listed)

        near = [
            path
            for path, data in self._entries()
            if any(map(is_needed, _OUT.findall(data.partition(_OUTS)[2])))
        ]
        return [entry for entry in map(self._parse, near) if entry]

    def _consumers(self, entries: list[Entry]) -> list[Entry]:
        """The entries of stages that have an output of some entries as an input."""
        outs = {(path, md5) for entry in entries for path, md5 in entry.outs.items()}
        marks = [md5.encode() for _, md5 in outs]
        parsed = (
            self._parse(path)
            for path, data in self._entries()
            if any(mark in data.partition(_OUTS)[0] for mark in marks)
        )
        return [entry for entry in parsed if entry and not outs.isdisjoint(entry.deps.items())]


def md5_file(path: Path) -> str:
    """Return the hex md5 of a file's bytes, as DVC names it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _md5s(items: Any) -> dict[str, str]:
    """md5 by path of an entry's deps or outs."""
    return {item["path"]: item["md5"] for item in items or () if MD5.fullmatch(item["md5"])}
