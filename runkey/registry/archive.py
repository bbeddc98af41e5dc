"""Pack a folder into one zip file, and unpack a file that may come from anybody.

The first member, `index.json`, lists every other member with its size and sha256. `unpack` writes
only listed members, only below the target folder, never more bytes than listed, and compares every
hash. `safe_path` and `check_weights` check the names and the weights of any file from elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runkey.errors import RegistryError
from runkey.hashing import sha256_file
from runkey.identity.key import ANY_SCHEMA
from runkey.progress import progress
from runkey.units import MIB

_LONGEST_NAME = 1000
_DRIVE = re.compile(r"^[A-Za-z]:")
_ODD_CHARACTER = re.compile(r"[\x00-\x1f\x7f\\]")
_RESERVED = (".git", ".dvc")


def safe_path(name: object, where: str) -> str:
    """Return `name` if it is a plain relative path that stays below the folder it is joined to.

    Args:
        name: a path with `/` between its parts.
        where: named in errors.

    Raises:
        RegistryError: it is absolute, leaves the folder, names a drive, has a backslash or a
            control character, or leads into git's or DVC's own folder.
    """
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
        raise RegistryError(f"{where}: {str(name)[:60]!r} is no name of a file; refused")
    why = None
    if _ODD_CHARACTER.search(name):
        why = "has a backslash or a control character"
    elif name.startswith("/") or _DRIVE.match(name):
        why = "is absolute"
    elif ".." in name.split("/"):
        why = "leaves its folder"
    elif PurePosixPath(name).as_posix() != name:
        why = "is not in its shortest form"
    elif any(part.lower() in _RESERVED for part in name.split("/")):
        why = "leads into .git or .dvc"
    if why:
        raise RegistryError(f"{where}: the name {name!r} {why}; refused")
    return name


_PICKLES = (".pkl", ".pickle", ".joblib", ".dill")
_TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
_LARGEST_HEADER = 100_000_000
"""Bytes; the safetensors library has the same limit."""
# The loader that runkey uses for weights of older runs; a process of its own reads the file.
_LOAD = """
import sys, torch
torch.load(sys.argv[1], map_location="cpu", weights_only=True, mmap=True)
"""


def check_weights(path: Path, name: str) -> None:
    """Refuse a file that could run code when it is loaded.

    Weights are safetensors, whose header is compared with the file's size. A torch file of an
    older run, and any zip file that holds a pickle, is taken only if torch itself loads it with
    `weights_only=True`, as runkey does.

    Args:
        path: the file.
        name: what it will be called; named in errors.

    Raises:
        RegistryError: it is a pickle, or weights in a form that cannot be loaded safely.
    """
    lower = name.lower()
    if lower.endswith(_PICKLES):
        raise RegistryError(f"{name}: a pickle can run any code when it is loaded; refused")
    if lower.endswith(".safetensors"):
        _check_safetensors(path, name)
    elif lower.endswith(_TORCH_FILES) or _holds_pickle(path, name):
        _check_torch_file(path, name)


def _check_safetensors(path: Path, name: str) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fits = 0 < length <= min(size - 8, _LARGEST_HEADER)
        header = file.read(length) if fits else b""
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
        fits = max(ends, default=0) == size - 8 - length
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
        fits = False
    if not fits:
        raise RegistryError(f"{name}: not a whole safetensors file; refused")


def _holds_pickle(path: Path, name: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.lower().endswith(_PICKLES) for member in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise RegistryError(f"{name}: a damaged zip ({error}); refused") from None


def _check_torch_file(path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)], capture_output=True, check=False
    )
    if done.returncode:
        text = done.stderr.decode("utf-8", "replace")
        found = re.search(r"GLOBAL (\S+)", text)
        why = f": its pickle names {found[1]}" if found else ""
        raise RegistryError(f"{name}: torch does not load it with weights_only=True{why}; refused")


SCHEMA = "archive1"
INDEX = "index.json"

_CHUNK = MIB
_LARGEST_INDEX = 64 * MIB
_MOST_MEMBERS = 1_000_000
_LEFT_FREE = 64 * MIB
"""Bytes that unpacking leaves on the disk."""
_KEY = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_COMPRESSED = (".zip", ".pt", ".safetensors", ".jpg", ".png")
"""Ends of names of files that deflating does not make smaller."""
# All members have one date, so that the same run gives the same archive.
_DATE = (2000, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Index:
    """The list of an archive's members."""

    key: str
    members: dict[str, tuple[int, str]]
    """Bytes and hex sha256 by name."""

    @property
    def size(self) -> int:
        """Bytes of all members, unpacked."""
        return sum(size for size, _ in self.members.values())


def pack(folder: Path, key: str, target: Path) -> Index:
    """Write every file of a folder to an archive, whole or not at all.

    Raises:
        RegistryError: it cannot be written.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    index = Index(key, {n: (p.stat().st_size, sha256_file(p)) for n, p in files.items()})
    listed = {n: {"size": size, "sha256": digest} for n, (size, digest) in index.members.items()}
    text = json.dumps({"schema": SCHEMA, "key": key, "members": listed}, indent=1)
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    try:
        with (
            zipfile.ZipFile(temporary, "w") as archive,
            progress("pack", index.size, "bytes") as steps,
        ):
            archive.writestr(_member(INDEX), text)
            for name, path in files.items():
                with (
                    path.open("rb") as source,
                    archive.open(_member(name), "w", force_zip64=True) as copy,
                ):
                    while chunk := source.read(_CHUNK):
                        copy.write(chunk)
                        steps.advance(len(chunk), name)
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RegistryError(f"{target}: {error.strerror or error}") from None
    return index


def unpack(file: Path, folder: Path) -> Index:
    """Write an archive's members to an empty folder.

    Raises:
        RegistryError: it is no archive of ours, is damaged, or is made to do harm; the text says
            how. What was written until then stays in `folder`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            index = _read_index(archive, file.name)
            _check_free_space(index, folder, file.name)
            with progress("unpack", index.size, "bytes") as steps:
                for name, (size, digest) in index.members.items():
                    steps.advance(0, name)
                    _unpack_member(archive, name, size, digest, folder, file.name)
                    steps.advance(size)
            return index
    except FileNotFoundError:
        raise RegistryError(f"{file}: no such file") from None
    # zipfile raises NotImplementedError for unknown methods, RuntimeError for passwords.
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
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
        _check_member(info, where)
    if INDEX not in names:
        raise RegistryError(f"{where}: has no {INDEX}; not an archive that runkey wrote")
    with archive.open(INDEX) as file:
        data = file.read(_LARGEST_INDEX + 1)
    if len(data) > _LARGEST_INDEX:
        raise RegistryError(f"{where}: {INDEX} is larger than 64 MiB; refused")
    try:
        index = _parse_index(json.loads(data), where)
    except (ValueError, RecursionError):
        raise RegistryError(f"{where}: {INDEX} is not JSON") from None
    strange = set(names) - {INDEX} - set(index.members)
    lost = set(index.members) - set(names)
    if strange:
        raise RegistryError(f"{where}: holds {min(strange)!r}, which {INDEX} does not list")
    if lost:
        raise RegistryError(f"{where}: lacks {min(lost)!r}, which {INDEX} lists")
    return index


def _check_member(info: zipfile.ZipInfo, where: str) -> None:
    safe_path(info.filename, where)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG):
        raise RegistryError(f"{where}: {info.filename!r} is a link or no plain file; refused")
    if info.flag_bits & 1 or info.compress_type not in _METHODS:
        raise RegistryError(
            f"{where}: {info.filename!r} is encrypted or packed in a way that runkey does not use"
        )


def _parse_index(stored: Any, where: str) -> Index:
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        raise RegistryError(
            f"{where}: {INDEX} is not of the schema {SCHEMA} that this runkey reads"
        )
    key, listed = stored.get("key"), stored.get("members")
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise RegistryError(f"{where}: {INDEX} names no key")
    if not isinstance(listed, dict) or len(listed) > _MOST_MEMBERS:
        raise RegistryError(f"{where}: {INDEX} has no list of members, or too long a one")
    members: dict[str, tuple[int, str]] = {}
    for name, member in listed.items():
        fields = member if isinstance(member, dict) else {}
        size, digest = fields.get("size", -1), str(fields.get("sha256"))
        if type(size) is not int or size < 0 or not _SHA256.fullmatch(digest):
            raise RegistryError(f"{where}: {INDEX}: {name!r} has no size or no sha256")
        members[safe_path(name, where)] = (size, digest)
    return Index(key, members)


def _check_free_space(index: Index, folder: Path, where: str) -> None:
    free = shutil.disk_usage(folder).free
    if index.size > free - _LEFT_FREE:
        raise RegistryError(
            f"{where}: unpacks to {index.size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )


def _unpack_member(
    archive: zipfile.ZipFile, name: str, size: int, digest: str, folder: Path, where: str
) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    hashed, left = hashlib.sha256(), size
    with archive.open(name) as source, path.open("xb") as copy:
        # Ask for one byte more than listed: a member that has it is refused, however long it is.
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise RegistryError(f"{where}: {name!r} is larger than its {size} bytes; refused")
            hashed.update(chunk)
            copy.write(chunk)
    if left or hashed.hexdigest() != digest:
        raise RegistryError(f"{where}: {name!r} is not what {INDEX} lists; damaged")
