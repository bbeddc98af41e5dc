"""A lock that lets one process train in a folder.

It is a POSIX record lock, which belongs to the process, not to the open file, so that it is free as
soon as the trainer is gone. A flock would live on in the loader processes that a killed trainer
leaves behind, and a file with a process id in it would stay for ever. Nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runkey.errors import TrainingError

logger = logging.getLogger(__name__)

LOCK = "lock"

# struct flock of Linux on 64 bits: type, whence, start, length, process.
_FLOCK = "hhqqi4x"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a training, which is created, as long as the block runs.

    One that cannot be written is not held: no other process writes there either. No other code of
    this process may open the lock's file meanwhile: closing it anywhere releases the lock. Raises
    TrainingError if another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        logger.info(
            f"{folder}: cannot be written ({error.strerror}); an interrupted training starts anew"
        )
        yield
        return
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder, text = _holder(file), f"{folder / LOCK}: cannot be locked ({error.strerror})"
            if holder is not None:
                who = f"process {holder}" if holder > 0 else "a process out of sight"
                text = (
                    f"{folder}: {who} trains this key already; wait for it or end it (it leaves a "
                    "checkpoint), then run `dvc repro` again"
                )
            raise TrainingError(text) from None
        yield
    finally:
        os.close(file)


def holder_of(folder: Path) -> int | None:
    """Return the id of the other process that trains in a folder; None if none does.

    0 or less: it has no id here (another container, a lock that cannot be read).
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:
        return 0
    try:
        return _holder(file)
    finally:
        os.close(file)


def _holder(file: int) -> int | None:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(process)
