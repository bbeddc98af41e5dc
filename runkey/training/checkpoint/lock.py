"""One trainer in a training's folder.

A POSIX record lock: it belongs to the process, not to the open file, so that it is free as soon as
the trainer is gone.  A flock would live on in the loader processes that a killed trainer leaves
behind, and a file with a process id in it would outlive everybody.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runkey.errors import TrainingError

LOCK = "lock"

# struct flock of Linux on 64 bits: type, whence, start, length, process.
_FLOCK = "hhqqi4x"


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder, which is made, as long as the block runs.

    A folder that cannot be written is not held: nobody else writes there either.

    No other code of this process may open the lock's file meanwhile: closing it anywhere in the
    process gives the lock up.

    Args:
        folder: of one training.
        say: told, in one line, if the folder cannot be written.

    Raises:
        TrainingError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        say(f"{folder}: cannot be written ({error.strerror}); an interrupted training starts anew")
        yield
        return
    try:
        _take(file, folder)
        yield
    finally:
        os.close(file)


def trained_by(folder: Path) -> int | None:
    """Id of the process that trains in a folder, 0 or less if it is out of sight; None: nobody.

    Not for the trainer itself: see `locked`.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        return _holder(file)
    finally:
        os.close(file)


def _take(file: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(file)
        if holder is None:
            raise TrainingError(f"{folder / LOCK}: cannot be locked ({error.strerror})") from None
        # In another container it has no number here.
        who = f"process {holder}" if holder > 0 else "a process out of sight"
        raise TrainingError(
            f"{folder}: {who} trains this key already; wait for it or end it (it leaves a "
            "checkpoint), then run `dvc repro` again"
        ) from None


def holder_of(folder: Path) -> int | None:
    """Id of the process that trains in a folder, 0 if it is out of sight; None: nobody does.

    Never to be asked by the process that holds the folder itself: see `locked`.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _holder(file)
    finally:
        os.close(file)


def _holder(file: int) -> int | None:
    """Id of the process that holds the lock; None: nobody does."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(process)
