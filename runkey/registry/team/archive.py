"""A folder as one zip file, and safely out of it again.

`index.json`, the first member, lists every other one with its size and sha256.  An archive may come
from anybody: nothing is unpacked that is not listed, no name leads out of the folder, no member is
read further than its listed size, and every hash is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.hashing import sha256_file
from runkey.identity.key import ANY_SCHEMA
from runkey.progress import progress
from runkey.registry.team.safe_names import safe_path

SCHEMA = "archive1"
INDEX = "index.json"
SUFFIX = ".runkey.zip"

_CHUNK = 1 << 20
_LARGEST_INDEX = 64 << 20
_MOST = 1_000_000
_LEFT_FREE = 64 << 20
"""Bytes that unpacking leaves on the disk."""
_KEY = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SQUEEZED = (".zip", ".pt", ".jpg", ".png")
"""Ends of names of files that deflating does not make smaller."""
# Members are written with one date: the same run gives the same archive.
_DATE = (2000, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Index:
    """What an archive says that it holds."""

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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    members = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, sha256_file(path))
        for path in files
    }
    listed = {name: {"size": size, "sha256": digest} for name, (size, digest) in members.items()}
    text = json.dumps({"schema": SCHEMA, "key": key, "members": listed}, indent=1)
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    try:
        with (
            zipfile.ZipFile(temporary, "w") as archive,
            progress("pack", sum(size for size, _ in members.values()), "bytes") as steps,
        ):
            archive.writestr(_member(INDEX), text)
            for name, path in zip(members, files, strict=True):
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
    return Index(key, members)


def unpack(file: Path, folder: Path) -> Index:
    """Write an archive's members to an empty folder.

    Raises:
        RegistryError: it is no archive of ours, is damaged, or is made to do harm; the text says
            how.  What was written until then stays in `folder`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            index = _index(archive, file.name)
            _refuse_large(index, folder, file.name)
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
    info.compress_type = zipfile.ZIP_STORED if name.endswith(_SQUEEZED) else zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info


def _index(archive: zipfile.ZipFile, where: str) -> Index:
    """The index, agreeing with the list of members that the zip itself has."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    # ZipInfo cuts a name at a NUL; what stood behind it is in orig_filename.
    if odd := [info for info in infos if info.orig_filename != info.filename]:
        raise RegistryError(f"{where}: the name {odd[0].orig_filename!r} is not plain; refused")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RegistryError(f"{where}: holds {twice!r} twice; refused")
    for info in infos:
        _refuse_odd(info, where)
    if INDEX not in names:
        raise RegistryError(f"{where}: has no {INDEX}; not an archive that runkey wrote")
    index = _parse(_read_index(archive, where), where)
    strange = set(names) - {INDEX} - set(index.members)
    lost = set(index.members) - set(names)
    if strange or lost:
        what = f"holds {min(strange)!r}, which" if strange else f"lacks {min(lost)!r}, which"
        raise RegistryError(f"{where}: {what} {INDEX} {'does not list' if strange else 'lists'}")
    return index


def _refuse_odd(info: zipfile.ZipInfo, where: str) -> None:
    safe_path(info.filename, where)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG):
        raise RegistryError(f"{where}: {info.filename!r} is a link or no plain file; refused")
    if info.flag_bits & 1 or info.compress_type not in _KINDS:
        raise RegistryError(
            f"{where}: {info.filename!r} is encrypted or packed in a way that runkey does not use"
        )


def _read_index(archive: zipfile.ZipFile, where: str) -> Any:
    with archive.open(INDEX) as file:
        content = file.read(_LARGEST_INDEX + 1)
    if len(content) > _LARGEST_INDEX:
        raise RegistryError(f"{where}: {INDEX} is larger than 64 MiB; refused")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise RegistryError(f"{where}: {INDEX} is not JSON") from None


def _parse(stored: Any, where: str) -> Index:
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        raise RegistryError(
            f"{where}: {INDEX} is not of the schema {SCHEMA} that this runkey reads"
        )
    key, listed = stored.get("key"), stored.get("members")
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise RegistryError(f"{where}: {INDEX} names no key")
    if not isinstance(listed, dict) or len(listed) > _MOST:
        raise RegistryError(f"{where}: {INDEX} has no list of members, or too long a one")
    members: dict[str, tuple[int, str]] = {}
    for name, told in listed.items():
        fields = told if isinstance(told, dict) else {}
        size, digest = fields.get("size", -1), str(fields.get("sha256"))
        if type(size) is not int or size < 0 or not _SHA256.fullmatch(digest):
            raise RegistryError(f"{where}: {INDEX}: {name!r} has no size or no sha256")
        members[safe_path(name, where)] = (size, digest)
    return Index(key, members)


def _refuse_large(index: Index, folder: Path, where: str) -> None:
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
        # A byte more than listed is asked for: what has it is refused, however much follows.
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise RegistryError(f"{where}: {name!r} is larger than its {size} bytes; refused")
            hashed.update(chunk)
            copy.write(chunk)
    if left or hashed.hexdigest() != digest:
        raise RegistryError(f"{where}: {name!r} is not what {INDEX} lists; damaged")
