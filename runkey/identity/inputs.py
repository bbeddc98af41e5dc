"""Whether what a stage reads is what its key says: the tracked data, and what prepare made of them.

    Inputs(root, params, recipe, home).check()    # RecipeError names the file that differs

DVC runs a single stage (`dvc repro -s train`, `--downstream`) on data that were edited after
`dvc add`, or on an old prepared/.  prepared/inputs.json names what prepare read and wrote.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

from runkey.errors import RecipeError, RunkeyError
from runkey.files import LARGE, open_plain, read_json, write_json
from runkey.hashing import sha256_bytes
from runkey.identity.dvc_yaml import folder_md5, pointer_of, tracked_files, tracked_md5
from runkey.identity.key import (
    DATA_PATH,
    FILE_PARAMS,
    NO_FILE,
    PARTS,
    Recipe,
    make_recipe,
    part_digest,
    short_key,
)
from runkey.paths import DATABASE, PREPARED, RUN_JSON, STATE_FOLDERS
from runkey.progress import each

if TYPE_CHECKING:
    from runkey.params import Params

logger = logging.getLogger(__name__)

INPUTS = PREPARED / "inputs.json"
HASHES = "hashes.sqlite"
"""File in `Store.home`: md5 of files, by which an unchanged file is not read again."""
NOTE = "tree.json"
"""File in `Store.home`: the newest answer of `tree_note`, and the state of the files then."""
_NO_CODE = re.compile(r"\.venv.*|\..*_cache|__pycache__")
_MOST_FILES = 5000
_MANY_FILES = 2000
_SCHEMA, _MAKER = "inputs1", "prepare"
DataRead = Literal["all", "images", "none"]
"""Which tracked data a stage reads; training reads no JSON, and no image that is cached."""
_TABLE = """CREATE TABLE IF NOT EXISTS hashes (
    device INTEGER, inode INTEGER, size INTEGER, modified INTEGER, changed INTEGER,
    md5 TEXT, hashed REAL, PRIMARY KEY (device, inode)
)"""
_FIND = """SELECT md5 FROM hashes
    WHERE device = ? AND inode = ? AND size = ? AND modified = ? AND changed = ?"""
_KEPT_SECONDS = 60 * 86_400.0
_BUSY_SECONDS = 20.0
_TICK_NS = 2_000_000_000
"""A file that is younger may be changed again without another time of change."""


class _Stored(TypedDict):
    parts: dict[str, str]
    files: dict[str, str]


class _Note(TypedDict):
    state: str
    note: str


class _Named(TypedDict):
    stage: str
    key: str


class FileHashes:
    """md5 of files; of those that did not change since, read from `HASHES`.

    A file did not change if size, time of modification and time of change, which no program can
    set, are the same.  If `HASHES` cannot be read or written, all are hashed.
    """

    def __init__(self, home: Path, unsaved: dict[tuple[int, ...], str] | None = None) -> None:
        """Args: home: `Store.home`; unsaved: takes the hashes that `HASHES` cannot take."""
        self._path = home / HASHES
        self._unsaved = {} if unsaved is None else unsaved
        self._new: list[tuple[tuple[int, ...], str, float]] = []
        self._database: sqlite3.Connection | None = None
        try:
            self._database = self._open()
            self._database.execute("BEGIN")  # one lock for all reads
        except (sqlite3.OperationalError, OSError) as error:
            logger.debug(f"{self._path}: {error}")
        except sqlite3.DatabaseError:
            with suppress(OSError):  # a read-only folder
                self._path.unlink()  # damaged

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and not self._path.is_file():  # sqlite would wait at a pipe
            raise OSError("not a file")
        database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        database.execute(_TABLE)
        return database

    def md5(self, path: Path) -> str:
        """Return the hex md5 of a file; OSError if it cannot be read."""
        found = path.stat()
        times = (found.st_mtime_ns, found.st_ctime_ns)
        state = (found.st_dev, found.st_ino, found.st_size, *times)
        if known := self._unsaved.get(state) or self._stored(state):
            return known
        with open_plain(path) as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        now = time.time()
        if now * 1e9 - max(times) > _TICK_NS:
            self._new.append((state, md5, now))
        return md5

    def _stored(self, state: tuple[int, ...]) -> str | None:
        # One by one: those of all experiments' copies of the data would not fit into memory.
        if self._database is None:
            return None
        try:
            row = self._database.execute(_FIND, state).fetchone()
        except sqlite3.Error as error:
            logger.debug(f"{self._path}: {error}")
            self._database.close()
            self._database = None
            return None
        return str(row[0]) if row else None

    def close(self) -> None:
        """Write the new hashes."""
        if self._database:
            self._database.close()
        if not self._new:
            return
        try:
            with closing(self._open()) as database, database:
                values = ", ".join("?" * 7)
                rows = ((*state, md5, now) for state, md5, now in self._new)
                database.executemany(f"INSERT OR REPLACE INTO hashes VALUES ({values})", rows)
                old = time.time() - _KEPT_SECONDS
                database.execute("DELETE FROM hashes WHERE hashed < ?", (old,))
        except (sqlite3.Error, OSError) as error:  # a full disk, a read-only folder
            logger.debug(f"{self._path}: {error}")
            self._unsaved.update({state: md5 for state, md5, _ in self._new})


class Inputs:
    """What a stage reads, as the key said it when this was made."""

    def __init__(self, root: Path, params: Params, recipe: Recipe, home: Path) -> None:
        """Read the lists of files; RecipeError if a .dvc file cannot be read.

        Args:
            root: the workspace.
            params: of it.
            recipe: of the stage, made of `params`.
            home: `Store.home`.
        """
        self._root, self._home = root, home
        self._unsaved: dict[tuple[int, ...], str] = {}
        self._cost, self._checked = 0.0, -math.inf
        prepare = recipe if recipe.stage == _MAKER else make_recipe(_MAKER, root, params)
        # As far as DVC runs prepare again when one changes.
        code = part_digest("code", prepare.preimages["code"]["files"])
        self._parts = prepare.parts | {"code": code}
        self._data: list[_Tracked] = []
        for name, md5 in recipe.preimages["data"].items():
            path = str(PurePosixPath(params.flat()[DATA_PATH])) if name == "data" else name
            pointer = pointer_of(path, root)
            if pointer is not None:
                self._data.append(_Tracked(path, pointer, md5, tracked_files(path, root)))

    def check(self, data: DataRead = "all") -> None:
        """Check data and prepared/; what is not there is not checked.

        Raises:
            RecipeError: a file differs; the text names it and the way out.
        """
        began = time.monotonic()
        with closing(FileHashes(self._home, self._unsaved)) as hashes:
            if data != "none":
                self._check_data(hashes, data)
            if (self._root / PREPARED).is_dir():
                self._check_prepared(hashes)
        self._checked = time.monotonic()
        self._cost = self._checked - began

    def check_again(self, data: DataRead) -> None:
        """Check, unless that takes more than 1% of the time: many files on a network drive do."""
        if time.monotonic() - self._checked >= 100 * self._cost:
            self.check(data)

    def begin_prepare(self) -> None:
        """Check the data before prepare reads them."""
        (self._root / INPUTS).unlink(missing_ok=True)
        with closing(FileHashes(self._home, self._unsaved)) as hashes:
            self._check_data(hashes)

    def end_prepare(self) -> None:
        """Write `INPUTS`, when prepare has written all else; RecipeError if the data changed."""
        with closing(FileHashes(self._home, self._unsaved)) as hashes:
            self._check_data(hashes)
            folder = self._root / PREPARED
            files = {name: hashes.md5(folder / name) for name in sorted(_walk(folder))}
        stored = {"schema": _SCHEMA, "parts": self._parts, "files": files}
        write_json(self._root / INPUTS, stored)

    def _check_prepared(self, hashes: FileHashes) -> None:
        way_out = "`dvc repro` makes it anew"
        try:
            stored = read_json(self._root / INPUTS, _Stored, most=LARGE)
            parts, files = stored["parts"], stored["files"]
        except FileNotFoundError:
            text = f"{INPUTS}: not found, so what {PREPARED}/ was made from is not known"
            raise RecipeError(f"{text}; {way_out}") from None
        except ValueError as error:
            text = f"{INPUTS}: not as prepare writes it ({error})"
            raise RecipeError(f"{text}; {way_out}") from None
        if other := [part for part in PARTS if parts.get(part) != self._parts[part]]:
            raise RecipeError(
                f"{PREPARED}/: made from other {' and '.join(other)} than there are now, so the"
                f" key would name what this stage does not read; {way_out}"
            )
        folder = self._root / PREPARED
        # Hidden ones are of file managers and network drives; no stage reads them.
        there = {name for name in _walk(folder) if not PurePosixPath(name).name.startswith(".")}
        for name in sorted((there | files.keys()) - {INPUTS.name}):
            path = folder / name
            if name not in files or not path.is_file() or hashes.md5(path) != files[name]:
                raise RecipeError(f"{PREPARED / name}: not as prepare wrote it; {way_out}")

    def _check_data(self, hashes: FileHashes, read: DataRead = "all") -> None:
        for one in self._data:
            path = self._root / one.path
            differing = one.differing(path, hashes) if path.exists() else []
            if read == "images":  # and none that is not listed, see `runkey.identity.audit`
                listed = one.listed or {"": ""}
                differing = [f for f in differing if f in listed and not f.endswith(".json")]
            if differing and not self._is_clean_by_dvc(one, differing):
                tracked, more = one.pointer.removesuffix(".dvc"), len(differing) - 1
                file = one.place_of(differing[0])
                others = f" and {more} more" if more else ""
                raise RecipeError(
                    f"{file}{others}: not what {one.pointer} says, so the key would be of other"
                    f" data than this stage reads; `dvc add {tracked}` takes the change, `dvc"
                    f" checkout --force {one.pointer}` takes it back; then `dvc repro`"
                )

    def _is_clean_by_dvc(self, one: _Tracked, differing: list[str]) -> bool:
        """Ask DVC, which takes half a second: it leaves out what .dvcignore names."""

        def ask(*arguments: str, text: str = "") -> str:
            command = [sys.executable, "-m", "dvc", *arguments]
            done = subprocess.run(
                command, cwd=self._root, input=text, capture_output=True, text=True, check=False
            )
            return done.stdout.strip()

        if one.listed is not None and not set(differing) & one.listed.keys():
            places = [one.place_of(file) for file in differing]
            ignored = ask("check-ignore", "--stdin", text="\n".join(places))
            return set(places) <= set(ignored.splitlines())
        # DVC 2 hashed texts without their line ends.
        is_older = "hash: md5" not in (self._root / one.pointer).read_text(encoding="utf-8")
        is_key = tracked_md5(one.path, self._root) == one.md5
        is_asked = is_key and (is_older or one.listed is None)
        return is_asked and ask("status", "--json", one.pointer) == "{}"


class _Tracked(NamedTuple):
    path: str
    pointer: str
    """The .dvc file."""
    md5: str
    """As in the key."""
    listed: dict[str, str] | None
    """See `tracked_files`."""

    def place_of(self, file: str) -> str:
        """Return the path of a file, which is given relative to the tracked path."""
        return (PurePosixPath(self.path) / file).as_posix()

    def differing(self, path: Path, hashes: FileHashes) -> list[str]:
        """List the files at the tracked path that are not as listed; "" is the path itself."""
        if path.is_file():
            return [] if self.md5 == f"md5:{hashes.md5(path)}" else [""]
        there, listed = _walk(path), self.listed
        if listed is None:  # DVC's cache has no list of them
            found = {name: hashes.md5(path / name) for name in there}
            return [] if self.md5 == f"md5:{folder_md5(found)}" else [""]
        both = sorted(there & listed.keys())
        shown = each(f"compare {self.path}", both, "files") if len(both) > _MANY_FILES else both
        same = {name for name in shown if hashes.md5(path / name) == listed[name]}
        return sorted((there | listed.keys()) - same)


def check_unchanged(root: Path, recipe: Recipe) -> None:
    """Raise RecipeError if the files of a workspace have another key now than a recipe."""
    now = make_recipe(recipe.stage, root)
    if now.key != recipe.key:
        parts = " and ".join(p for p in PARTS if now.parts[p] != recipe.parts[p]) or "commands"
        raise RecipeError(f"the {parts} of key {short_key(recipe.key)} changed since this began")


def _walk(folder: Path) -> set[str]:
    """Return the files in a folder, relative to it; as DVC, follow no link to another folder."""
    start = len(str(folder)) + 1
    return {f"{top}/{name}"[start:] for top, _, names in os.walk(folder) for name in names}


def tree_note(root: Path, params: Params | None = None, home: Path | None = None) -> str:
    """Say that run.json is of another key than the files here have; empty if it is not.

    Whether the data are as their .dvc files say is not looked at.

    Args:
        root: the workspace.
        params: of it, if they are read already.
        home: `Store.home`, where the answer is kept until a file changes; None: always look.
    """
    try:
        stored = read_json(root / RUN_JSON, _Named)
        stage, key = stored["stage"], stored["key"]
    except (OSError, ValueError):
        return ""
    state = _tree_state(root) if home else None
    if home and state and (known := _kept_note(home, state)) is not None:
        return known
    try:
        recipe = make_recipe(stage, root, params)
    except RunkeyError as error:
        return f"{RUN_JSON} is of {short_key(key)}; the key of the files here is not known: {error}"
    values = recipe.preimages["params"]
    has_weights = any(values.get(name) not in NO_FILE for name in FILE_PARAMS)
    note = ""
    if recipe.key != key:
        note = (
            f"{RUN_JSON} is of {short_key(key)}, the files here now have the key"
            f" {short_key(recipe.key)}; `runkey diff {short_key(key)} .` says why, `dvc repro`"
            " trains it"
        )
    if home and state and not has_weights:
        with suppress(OSError):  # a read-only folder
            write_json(home / NOTE, {"state": state, "note": note})
    return note


def _kept_note(home: Path, state: str) -> str | None:
    try:
        kept = read_json(home / NOTE, _Note)
    except (OSError, ValueError):
        return None
    return kept["note"] if kept["state"] == state else None


def _tree_state(root: Path) -> str | None:
    """Hash names, sizes and times of all files that a key may cover, which takes milliseconds.

    None if that is no proof, because a file was just changed, or would take long: in a folder with
    more than `_MOST_FILES` files, or with links to folders.
    """
    package = Path(__file__).parents[1]
    tops = [root] if package.is_relative_to(root) else [root, package]
    newest, states = 0, [f"{root} {sys.version} {os.uname()}"]
    for top, folders, names in chain.from_iterable(map(os.walk, tops)):
        tracked = {name.removesuffix(".dvc") for name in names if name.endswith(".dvc")}
        others = {*STATE_FOLDERS, *tracked} if Path(top) in tops else tracked
        folders[:] = [n for n in folders if n not in others and not _NO_CODE.fullmatch(n)]
        if any(os.path.islink(f"{top}/{name}") for name in folders):  # noqa: PTH114 - fast
            return None
        for path in (f"{top}/{name}" for name in names if not name.startswith(DATABASE)):
            try:
                found = os.stat(path)  # noqa: PTH116 - fast
            except OSError:
                return None
            times = (found.st_mtime_ns, found.st_ctime_ns)
            newest = max(newest, *times)
            states.append(f"{path} {found.st_ino} {found.st_size} {times}")
        if len(states) > _MOST_FILES:
            return None
    if time.time_ns() - newest <= _TICK_NS:
        return None
    return sha256_bytes("\0".join(sorted(states)).encode("utf-8", "surrogateescape"))
