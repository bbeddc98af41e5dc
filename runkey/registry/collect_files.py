"""Files and folders that dead processes left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runkey.registry.claims.owner import Owner, is_running, this_process

_PROC = Path("/proc")
OWNER = ".runkey-owner.json"
"""In a worktree of `runkey reproduce`: the process that works in it."""
_QUIET_SECONDS = 3600.0
"""How long a worktree of an unknown or unseen owner must have stood still."""
_HALF_WRITTEN_SECONDS = 86400.0
"""No file takes so long to be written."""


@dataclass(frozen=True)
class Found:
    """A file or folder that may go."""

    path: Path
    why: str

    @property
    def changed(self) -> float:
        """When it changed last, in seconds since 1970; a folder, by any file in it."""
        return max((status.st_mtime for status in _walk(self.path)), default=0.0)

    def remove(self) -> None:
        """Delete it."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what is linked to is not counted."""
    return sum(status.st_size for status in _walk(path) if status.st_nlink < 2)


def mark_owner(folder: Path) -> None:
    """Say in a worktree that this process works in it."""
    owner = json.dumps(this_process().as_dict())
    (folder / OWNER).write_text(f"{owner}\n", encoding="utf-8")


def worktrees(folder: Path, now: float) -> Iterator[Found]:
    """The worktrees of `runkey reproduce` that nobody works in.

    Args:
        folder: `<home>/reproduce`.
        now: seconds since 1970.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() or path.is_symlink():
            continue
        owner = _owner(path)
        seen = is_running(owner) if owner else None
        found = Found(path, f"its process {owner.label} is gone" if owner else "nobody works in it")
        quiet = seen is False or now - found.changed >= _QUIET_SECONDS
        # A stage goes on for a while when `runkey reproduce` itself is killed.
        if not seen and quiet and not _has_processes(path):
            yield found


def leftovers(home: Path, root: Path, now: float) -> Iterator[Found]:
    """Files that were being written when their process died.

    Args:
        home: `Store.home`.
        root: the main checkout.
        now: seconds since 1970.
    """
    places = [
        *home.glob("runs/.*"),
        *home.glob("claims/.*"),
        *home.glob(".*-*"),  # of runs handed on
        *root.glob(".runkey-*"),  # of downloads
        *root.glob(".run.json.[0-9]*"),
    ]
    for path in sorted(places):
        found = Found(path, "half written, by a process that is gone")
        if now - found.changed >= _HALF_WRITTEN_SECONDS:
            yield found


def _owner(path: Path) -> Owner | None:
    try:
        return Owner.from_dict(json.loads((path / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _has_processes(path: Path) -> bool:
    """Whether a process of this machine has its current folder in `path`."""
    top = path.resolve()
    for process in _PROC.glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(top):
                return True
        except OSError:
            continue  # it has ended, or is another user's
    return False


def _walk(path: Path) -> Iterator[os.stat_result]:
    """The status of a file, or of a folder and all in it, without following links."""
    try:
        yield path.lstat()
    except FileNotFoundError:
        return
    if path.is_dir() and not path.is_symlink():
        for folder, folders, files in os.walk(path):
            for name in (*folders, *files):
                try:
                    yield (Path(folder) / name).lstat()
                except FileNotFoundError:
                    continue  # removed meanwhile
