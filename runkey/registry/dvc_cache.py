"""DVC's cache, read as files, without DVC: which results it holds, and where their bytes lie.

    <cache>/runs/<ab>/<hash of the stage>/<hash of all>   what a stage took and gave, as YAML
    <cache>/files/md5/<ab>/<the other 30 digits>          a file by its md5
    <cache>/files/md5/<ab>/<...>.dir                      a folder: JSON list of {md5, relpath}

A run is found by the md5 of its run.json, which is an output of its stage.  DVC keeps the objects
of all outputs of an entry, those with `cache: false` as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.identity.dvc_files import cache_folder
from runkey.identity.pipeline import covers
from runkey.identity.yamltext import read_yaml_text

DIR = ".dir"
"""End of the md5 of a folder."""
_OUTS = b"\nouts:\n"
_OUT = re.compile(rb"^- path: (.+)\n(?:  .*\n)*?  md5: ([0-9a-f]{32}(?:\.dir)?)$", re.MULTILINE)
_MD5 = re.compile(r"[0-9a-f]{32}(?:\.dir)?")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One line of DVC's memory: a stage, what it was given and what it gave."""

    path: str
    """Of its file, posix, relative to the cache's runs/."""
    cmd: str
    deps: Mapping[str, str]
    """md5 by path; a folder's ends with `.dir`."""
    outs: Mapping[str, str]
    """Likewise, metrics and plots included."""


class DvcCache:
    """The cache of one checkout."""

    def __init__(self, root: Path) -> None:
        """Args: root: the checkout, a git worktree too; its DVC settings say where the cache is."""
        self.root = root
        self.folder = cache_folder(root)
        """Holds `runs/` and `files/md5/`; need not exist."""

    @property
    def runs(self) -> Path:
        """Folder of the entries."""
        return self.folder / "runs"

    def object_path(self, md5: str) -> Path:
        """Where the object of an md5 lies, or would lie."""
        return self.folder / "files" / "md5" / md5[:2] / md5[2:]

    def entry_of(self, pointer_md5: str) -> Entry | None:
        """The entry of the stage that wrote a file, such as a run's run.json; None if none did."""
        return self.entries_of([pointer_md5]).get(pointer_md5)

    def entries_of(self, pointer_md5s: Iterable[str]) -> dict[str, Entry]:
        """The same for several files in one search, by the md5s that were found."""
        wanted = {md5.encode() for md5 in pointer_md5s}
        found: dict[str, Entry] = {}
        for path, content in self._entries():
            outs = content.partition(_OUTS)[2] if wanted else b""
            for md5 in wanted.intersection(word for _, word in _OUT.findall(outs)):
                entry = self._parse(path)
                if entry and md5.decode() in entry.outs.values():
                    found[md5.decode()] = entry
        return found

    def chain(self, entry: Entry) -> list[Entry]:
        """The entries whose outputs one took, itself, and those that took its own.

        Those before and after it include the ones that are linked through others.
        """
        before = self._follow(entry, back=True)
        after = self._follow(entry, back=False)
        return [*reversed(before), entry, *after]

    def objects(self, md5s: Iterable[str]) -> dict[str, str]:
        """All objects of some md5s: themselves, and the files of those that are folders.

        Args:
            md5s: of files, or of folders (`.dir`).

        Returns:
            By md5 the file's path in its folder, `""` for those given.  The files of a folder whose
            own object is missing or torn are not known, and left out.
        """
        found: dict[str, str] = {}
        for md5 in md5s:
            found[md5] = ""
            for path, inner in self._listing(md5).items():
                found.setdefault(inner, path)
        return found

    def files(self, outs: Mapping[str, str]) -> dict[str, str]:
        """md5 by path of every object of some outputs; a folder stands there itself with a `/`."""
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
        # What is no md5 must not become a path in the cache.
        return {path: inner for path, inner in listed.items() if _MD5.fullmatch(inner)}

    def _entries(self) -> Iterator[tuple[str, bytes]]:
        """Path and content of every entry.  Searched as bytes: parsing takes 50 times as long."""
        for folder in _folders(self.runs):
            for stage in _folders(folder.path):
                for file in os.scandir(stage.path):
                    try:
                        content = Path(file.path).read_bytes()
                    except OSError:  # DVC's own temporary file, or swept away meanwhile
                        continue
                    yield f"{folder.name}/{stage.name}/{file.name}", content

    def _parse(self, path: str) -> Entry | None:
        """The entry in a file; None if it is not whole, which DVC takes for no entry as well."""
        try:
            tree = read_yaml_text(self.runs / path)
            return Entry(path, tree["cmd"], _md5s(tree.get("deps")), _md5s(tree["outs"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _follow(self, entry: Entry, *, back: bool) -> list[Entry]:
        """Entries linked to one, directly and through others, nearest first."""
        found: dict[str, Entry] = {}
        newest = [entry]
        while newest:
            near = self._givers(newest) if back else self._takers(newest)
            newest = [e for e in near if e.path not in found and e.path != entry.path]
            found |= {e.path: e for e in newest}
        return list(found.values())

    def _givers(self, entries: list[Entry]) -> list[Entry]:
        """Entries whose outputs some entries took."""
        deps = {(path, md5) for entry in entries for path, md5 in entry.deps.items()}
        known: dict[tuple[str, str], bool] = {}

        def given(out: tuple[str, str]) -> bool:
            if out not in known:
                known[out] = self._gives(out, deps)
            return known[out]

        near = []
        for path, content in self._entries():
            outs = _OUT.findall(content.partition(_OUTS)[2])
            if any(given((name.decode(errors="replace"), md5.decode())) for name, md5 in outs):
                near.append(path)
        return [entry for entry in map(self._parse, near) if entry]

    def _gives(self, out: tuple[str, str], deps: set[tuple[str, str]]) -> bool:
        """Whether an output is a dependency, or a folder that the dependency is a file of."""
        if out in deps:
            return True
        folder, md5 = out
        inside = {(p, m) for p, m in deps if p != folder and covers(folder, p)}
        if not inside:
            return False
        listed = {(f"{folder}/{path}", inner) for path, inner in self._listing(md5).items()}
        return not inside.isdisjoint(listed)

    def _takers(self, entries: list[Entry]) -> list[Entry]:
        """Entries that took an output of some entries whole."""
        outs = {(path, md5) for entry in entries for path, md5 in entry.outs.items()}
        marks = [md5.encode() for _, md5 in outs]
        near = [
            path
            for path, content in self._entries()
            if any(mark in content.partition(_OUTS)[0] for mark in marks)
        ]
        parsed = (self._parse(path) for path in near)
        return [entry for entry in parsed if entry and not outs.isdisjoint(entry.deps.items())]


def md5_file(path: Path) -> str:
    """Hex md5 of a file's bytes, as DVC names it."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _folders(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(path) if entry.is_dir()]
    except FileNotFoundError:
        return []


def _md5s(items: Any) -> dict[str, str]:
    """md5 by path of an entry's deps or outs."""
    return {item["path"]: item["md5"] for item in items or () if _MD5.fullmatch(item["md5"])}
