"""Pack a folder into one zip file, and unpack a file that may come from anybody.

The first member, `index.json`, lists every other member with its size and sha256. `unpack` writes
only listed members, only below the target folder, never more bytes than listed, and compares every
hash. `parse_json`, `safe_path` and `check_weights` check any file that comes from elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt
from safetensors import SafetensorError, safe_open

from runkey import files
from runkey.errors import RegistryError
from runkey.files import LARGE, FormatError, WriteError, open_plain, read_text, replacing
from runkey.hashing import hash_stream, sha256_file
from runkey.identity.key import ANY_SCHEMA
from runkey.progress import progress
from runkey.units import MIB, format_bytes

_LONGEST_NAME = 1000
_DRIVE = re.compile(r"^[A-Za-z]:")
_ODD_CHARACTER = re.compile(r"[\x00-\x1f\x7f\\]")
_RESERVED = {".git", ".dvc"}


def parse_json[T](form: type[T], source: Path | bytes, where: str) -> T:
    """Parse JSON that may come from anybody to a dataclass, TypedDict or other type.

    RegistryError if the file is not there, or is not of this form: it names the first wrong value.
    """
    try:
        text = read_text(source, LARGE) if isinstance(source, Path) else source
        parsed: T = files.parse_json(text, form)
    except FileNotFoundError:
        raise RegistryError(f"{where}: not there") from None
    except FormatError as error:
        raise RegistryError(f"{where}: {error}; refused") from None
    return parsed


def safe_path(name: str, where: str) -> str:
    """Return `name` if it is a plain relative path that stays below the folder it is joined to.

    RegistryError if not, or if it leads into git's or DVC's own folder.
    """
    if not name or len(name) > _LONGEST_NAME:
        raise RegistryError(f"{where}: {name[:60]!r} is no name of a file; refused")
    faults = {
        "has a backslash or a control character": _ODD_CHARACTER.search(name),
        "is absolute": name.startswith("/") or _DRIVE.match(name),
        "leaves its folder": ".." in name.split("/"),
        "is not in its shortest form": PurePosixPath(name).as_posix() != name,
        "leads into .git or .dvc": not _RESERVED.isdisjoint(name.lower().split("/")),
    }
    for why, is_so in faults.items():
        if is_so:
            raise RegistryError(f"{where}: the name {name!r} {why}; refused")
    return name


_PICKLES = (".pkl", ".pickle", ".joblib", ".dill")
_TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
# The loader that runkey uses for weights of older runs; a process of its own reads the file.
_LOAD = """
import sys, torch
torch.load(sys.argv[1], map_location="cpu", weights_only=True, mmap=True)
"""


def check_weights(path: Path, name: str) -> None:
    """Refuse a file that could run code when it is loaded.

    Weights are safetensors. A torch file of an older run, and any zip file that holds a pickle, is
    taken only if torch itself loads it with `weights_only=True`, as runkey does. `name` is what the
    file will be called.
    """
    lower = name.lower()
    try:
        open_plain(path).close()
    except OSError as error:
        raise RegistryError(f"{name}: {error.strerror}; refused") from None
    if lower.endswith(_PICKLES):
        raise RegistryError(f"{name}: a pickle can run any code when it is loaded; refused")
    if lower.endswith(".safetensors"):
        try:
            with safe_open(path, "np"):  # type: ignore[no-untyped-call]
                pass
        except SafetensorError as error:
            raise RegistryError(
                f"{name}: not a whole safetensors file ({error}); refused"
            ) from None
    elif lower.endswith(_TORCH_FILES) or _holds_pickle(path, name):
        command = [sys.executable, "-c", _LOAD, str(path)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            found = re.search(r"GLOBAL (\S+)", done.stderr)
            why = f": its pickle names {found[1]}" if found else ""
            raise RegistryError(
                f"{name}: torch does not load it with weights_only=True{why}; refused"
            )


def _holds_pickle(path: Path, name: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.lower().endswith(_PICKLES) for member in archive.namelist())
    except _DAMAGED as error:
        raise RegistryError(f"{name}: a damaged zip ({error}); refused") from None


_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError)
INDEX = "index.json"

_LARGEST_INDEX = 64 * MIB
_MOST_MEMBERS = 1_000_000
_LEFT_FREE = 64 * MIB
"""Bytes that unpacking leaves on the disk."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_COMPRESSED = (".zip", ".pt", ".safetensors", ".jpg", ".png")
"""Ends of names of files that deflating does not make smaller."""
# All members have one date, so that the same run gives the same archive.
_DATE = (2000, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    size: NonNegativeInt
    """Bytes, unpacked."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Index:
    """The list of an archive's members, by name."""

    key: Annotated[str, Field(pattern=f"^{ANY_SCHEMA}-[0-9a-f]{{64}}$")]
    members: Annotated[dict[str, Member], Field(max_length=_MOST_MEMBERS)]
    schema: Literal["archive1"]

    @property
    def size(self) -> int:
        """Bytes of all members, unpacked."""
        return sum(member.size for member in self.members.values())


def pack(folder: Path, key: str, target: Path) -> Index:
    """Write every file of a folder to an archive, whole or not at all."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    listed = {name: Member(path.stat().st_size, sha256_file(path)) for name, path in files.items()}
    index = Index(key, listed, "archive1")
    try:
        with (
            replacing(target, wanted=index.size) as written,
            zipfile.ZipFile(written, "w") as archive,
            progress("pack", index.size, "bytes") as steps,
        ):
            archive.writestr(_member(INDEX), json.dumps(asdict(index), indent=1))
            for name, path in files.items():
                steps.advance(0, name)
                with (
                    path.open("rb") as source,
                    archive.open(_member(name), "w", force_zip64=True) as copy,
                ):
                    shutil.copyfileobj(source, copy, MIB)
                steps.advance(listed[name].size)
    except WriteError:
        raise
    except OSError as error:  # of a file that is packed
        raise RegistryError(f"{error.filename or target}: {error.strerror or error}") from None
    return index


def unpack(file: Path, folder: Path) -> Index:
    """Write an archive's members to an empty folder.

    RegistryError if it is no archive of ours, is damaged, or is made to do harm: it says how. What
    was written until then stays in the folder.
    """
    if file.exists() and not file.is_file():  # a pipe or a device may have no end
        raise RegistryError(f"{file.name}: not a file; save the archive to one first")
    try:
        with open_plain(file) as source, zipfile.ZipFile(source) as archive:
            index = _read_index(archive, file.name)
            free = shutil.disk_usage(folder).free
            if index.size > free - _LEFT_FREE:
                raise RegistryError(
                    f"{file.name}: unpacking needs {format_bytes(index.size + _LEFT_FREE)},"
                    f" {format_bytes(_LEFT_FREE)} of it to spare, and {format_bytes(free)} are free"
                    f" in {folder.parents[1]}; make room there"
                )
            with progress("unpack", index.size, "bytes") as steps:
                for name, member in index.members.items():
                    steps.advance(0, name)
                    _unpack_member(archive, name, member, folder / name, file.name)
                    steps.advance(member.size)
            return index
    except FileNotFoundError:
        raise RegistryError(f"{file}: no such file") from None
    # zipfile raises NotImplementedError for unknown methods, RuntimeError for passwords.
    except (*_DAMAGED, RuntimeError, EOFError, ValueError) as error:
        raise RegistryError(f"{file.name}: not an archive of runs, or damaged ({error})") from None
    except OSError as error:
        raise RegistryError(f"{error.filename or file}: {error.strerror or error}") from None


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    stored = name.endswith(_COMPRESSED)
    info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info


def _read_index(archive: zipfile.ZipFile, where: str) -> Index:
    """The index, which must agree with the zip's own list of members."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    # ZipInfo cuts a name at a NUL; the whole name is in orig_filename.
    if odd := [info for info in infos if info.orig_filename != info.filename]:
        raise RegistryError(f"{where}: the name {odd[0].orig_filename!r} is not plain; refused")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RegistryError(f"{where}: holds {twice!r} twice; refused")
    for info in infos:
        safe_path(info.filename, where)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir() or kind not in (0, stat.S_IFREG):
            raise RegistryError(f"{where}: {info.filename!r} is a link or no plain file; refused")
        if info.flag_bits & 1 or info.compress_type not in _METHODS:
            raise RegistryError(
                f"{where}: {info.filename!r} is encrypted or packed in a way that runkey does not"
                " use"
            )
    if INDEX not in names:
        raise RegistryError(f"{where}: has no {INDEX}; not an archive that runkey wrote")
    with archive.open(INDEX) as file:
        data = file.read(_LARGEST_INDEX + 1)
    if len(data) > _LARGEST_INDEX:
        raise RegistryError(f"{where}: {INDEX} is larger than 64 MiB; refused")
    index = parse_json(Index, data, f"{where}: {INDEX}")
    strange = set(names) - {INDEX} - set(index.members)
    lost = set(index.members) - set(names)
    if strange:
        raise RegistryError(f"{where}: holds {min(strange)!r}, which {INDEX} does not list")
    if lost:
        raise RegistryError(f"{where}: lacks {min(lost)!r}, which {INDEX} lists")
    return index


def _unpack_member(
    archive: zipfile.ZipFile, name: str, member: Member, path: Path, where: str
) -> None:
    # zipfile gives no more bytes than the zip's own list says.
    if archive.getinfo(name).file_size > member.size:
        raise RegistryError(f"{where}: {name!r} is larger than its {member.size} bytes; refused")
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as source, path.open("xb") as copy:
        if hash_stream(source, copy) != (member.size, member.sha256):
            raise RegistryError(f"{where}: {name!r} is not what {INDEX} lists; damaged")
