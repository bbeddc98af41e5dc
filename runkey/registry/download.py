"""Copy files of a run, each checked against the hash that the run recorded."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

from runkey.errors import RegistryError
from runkey.hashing import sha256_file
from runkey.identity.record import Record, StoredFile
from runkey.progress import Steps, progress
from runkey.registry.library import Library
from runkey.registry.reading.local_library import inside

_CHUNK = 1 << 20


def download(library: Library, record: Record, paths: Iterable[str], target: Path) -> None:
    """Put artifacts of a run into a folder, all of them or none.

    They are written beside their places, hashed on the way, and moved only when all are right.

    Args:
        library: where the run is.
        record: the run, with its details.
        paths: of artifacts; they keep them below `target`.
        target: the folder; files in it of the same name are replaced.

    Raises:
        RegistryError: a file is not recorded, missing, or not what was recorded; the text names it
            and the run.
    """
    chosen = {path: _recorded(record, path) for path in paths}
    target.mkdir(parents=True, exist_ok=True)
    waiting = Path(tempfile.mkdtemp(prefix=".runkey-", dir=target))
    try:
        with progress("get", sum(stored.size for stored in chosen.values()), "bytes") as steps:
            for number, (path, stored) in enumerate(chosen.items()):
                _copy(library, record, path, stored, waiting / str(number), steps)
        for number, path in enumerate(chosen):
            place = target / inside(record, path)
            place.parent.mkdir(parents=True, exist_ok=True)
            (waiting / str(number)).replace(place)
    except OSError as error:
        raise RegistryError(f"{error.filename or target}: {error.strerror or error}") from None
    except HTTPException as error:
        raise RegistryError(f"{library.place}: the connection broke ({error!r})") from None
    finally:
        shutil.rmtree(waiting, ignore_errors=True)


def in_the_way(record: Record, paths: Iterable[str], target: Path) -> list[str]:
    """Those of the paths that lie in the folder already, with other contents.

    Raises:
        RegistryError: see `download`.
    """
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


def _copy(
    library: Library, record: Record, path: str, stored: StoredFile, place: Path, steps: Steps
) -> None:
    digest, size = hashlib.sha256(), 0
    with library.open_file(record, path) as source, place.open("wb") as copy:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            copy.write(chunk)
            steps.advance(len(chunk), path)
    if size != stored.size or digest.hexdigest() != stored.sha256:
        raise RegistryError(
            f"{record.label}: {path}: not what run {record.run.run_id} recorded ({size} bytes,"
            f" sha256 {digest.hexdigest()[:12]}; recorded {stored.size}, {stored.sha256[:12]});"
            f" `runkey verify {record.label}` says what else is wrong"
        )
