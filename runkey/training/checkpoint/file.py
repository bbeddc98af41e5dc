"""The file of a checkpoint, and of weights: facts, tensors, and a hash over both.

    RUNKEY CHECKPOINT 1 <sha256 of all that follows the first line>
    {"step": 120, ...}                          facts: one line of JSON, read without the rest
    <what torch.save wrote>

A file gets its name only when it is whole and on disk: it is written under another name, synced,
and renamed. The hash is for what happens later: a bad disk, a copy that was cut short.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from runkey.files import sync_folder
from runkey.training.tensors import FlatLayout, by_dtype, map_tensors, named_tensors

# What a checkpoint holds, and the interface of whatever saves them.


class Stateful(Protocol):
    """Something with tensors of its own: model, average, optimizer, loss scaler."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return its tensors and numbers; the tensors are its own, not copies."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Continue from what `state_dict` gave."""


@dataclass(frozen=True)
class Checkpoint:
    """A training at the boundary of a step."""

    step: int
    """Optimizer steps tried."""
    state: dict[str, Any]
    """`LoopState.as_plain()`."""
    parts: dict[str, Mapping[str, Any]]
    """State dicts by name: `model`, `optimizer`, ...; live tensors until it has been saved."""
    position: Mapping[str, int | str]
    """Where the log was, see `Tracker.position`."""
    best_weights: dict[str, Tensor]
    """State dict on the host of the best evaluation's weights; empty before the first one."""
    changes: str = ""
    """What is different now, such as `micro_batch 4 -> 2`; empty: training resumes bit for bit."""


class Checkpoints(Protocol):
    """Saves and loads checkpoints. Saving never raises: training goes on without."""

    @property
    def path(self) -> Path | None:
        """The training's folder, where reports are written too; None: not in files."""
        ...

    @property
    def newest(self) -> int | None:
        """Step of the newest one that training could resume from; None: there is none."""
        ...

    def due(self, step: int) -> bool:
        """Return True if one is to be saved at this boundary; cheap, asked after every step."""
        ...

    def save(self, checkpoint: Checkpoint, *, wait: bool = False, anchor: bool = False) -> None:
        """Copy the tensors and begin to write; the caller may go on changing them.

        Args:
            checkpoint: what to save.
            wait: return only when it is on disk.
            anchor: keep it as one that training may be rolled back to.
        """

    def load(self) -> Checkpoint | None:
        """Load the newest that is whole; None: there is none."""
        ...

    def load_anchor(self, step: int) -> Checkpoint | None:
        """Load the newest anchor at or before a step; None: there is none."""
        ...


# Names of the files in a training's folder, and which of them are obsolete.

KEPT = 2
"""Newest checkpoints that are kept, beside anchors."""
BAD = ".bad"
"""Ending added to the name of a file that could not be used."""
TEMPORARY = ".tmp"
"""Ending of the name that a file has while it is written."""

_NAME = re.compile(r"(step|anchor)-(\d{8,})\.ckpt")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """The name of a checkpoint's file, ordered by step."""

    step: int
    is_anchor: bool

    @property
    def name(self) -> str:
        """The file's."""
        return f"{'anchor' if self.is_anchor else 'step'}-{self.step:08d}.ckpt"


def find_checkpoints(folder: Path) -> list[CheckpointName]:
    """List the checkpoints in a folder, the newest first.

    Of the same step, an anchor comes last: it was saved before the epoch's evaluation.
    """
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    found = [CheckpointName(int(m.group(2)), m.group(1) == "anchor") for m in matches if m]
    return sorted(found, key=lambda one: (one.step, not one.is_anchor), reverse=True)


def obsolete(names: Iterable[CheckpointName]) -> list[CheckpointName]:
    """List those to remove: all but the newest two, and the anchors these may be rolled back to.

    An anchor is needed if it is the newest at or before a checkpoint that is kept, or after it:
    a rollback takes the newest one before the step that training is at.
    """
    newest_first = sorted(names, reverse=True)
    steps = [one for one in newest_first if not one.is_anchor]
    anchors = [one for one in newest_first if one.is_anchor]
    kept = (steps or anchors)[:KEPT]
    needed = next((a.step for a in anchors if a.step <= kept[-1].step), 0)
    return [*steps[KEPT:], *(anchor for anchor in anchors if anchor.step < needed)]


# Copies of tensors in host memory that is reused.

_ALIGNMENT = 16
"""Elements: every tensor begins at a multiple, as vector instructions like it."""


class HostCopy:
    """Copies nested dicts and lists of tensors to the host; each copy overwrites the one before."""

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._shapes: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        self._places: list[Tensor] = []
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def take(self, tree: Any) -> Any:
        """Return the same dicts and lists, with each tensor replaced by its copy on the host.

        On a GPU the copying is only queued behind the work there; `wait` before reading.
        """
        tensors = [tensor.detach() for _, tensor in named_tensors(tree)]
        shapes = [(tensor.size(), tensor.stride(), tensor.dtype) for tensor in tensors]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if shapes != self._shapes:
            self._places = _places(tensors, pinned=on_gpu)
            self._shapes = shapes
        self._events = (_event(), _event()) if on_gpu else None
        if self._events:
            self._events[0].record()  # type: ignore[no-untyped-call]
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        if self._events:
            self._events[1].record()  # type: ignore[no-untyped-call]
        places = iter(self._places)
        return map_tensors(tree, lambda _: next(places))

    def wait(self) -> float:
        """Return when the last copy is whole; for any thread.

        Returns:
            Seconds that the GPU spent on copying alone; 0 without one.
        """
        if self._events is None:
            return 0.0
        begun, ended = self._events
        ended.synchronize()
        milliseconds: float = begun.elapsed_time(ended)  # type: ignore[no-untyped-call]
        return milliseconds / 1000


def _places(tensors: list[Tensor], *, pinned: bool) -> list[Tensor]:
    """Allocate a host tensor for each tensor, all of one dtype in one flat tensor."""
    views = {}
    for dtype, group in by_dtype(tensors).items():
        layout = FlatLayout(group, _ALIGNMENT)
        views[dtype] = iter(layout.views(_zeros(layout.size, dtype, pinned)))
    return [next(views[tensor.dtype]) for tensor in tensors]


def _zeros(length: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """Allocate zeros: what lies between tensors is written too."""
    if pinned:
        # Hosts limit what can be page-locked. Ordinary memory only makes the copy slower.
        with suppress(RuntimeError):
            return torch.zeros(length, dtype=dtype, pin_memory=True)
    return torch.zeros(length, dtype=dtype)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


# Writing and reading a file.

_MAGIC = b"RUNKEY CHECKPOINT 1 "
_FIRST_LINE = len(_MAGIC) + 64 + 1


class DamagedError(Exception):
    """A file is not whole, or not what was looked for; the text says why."""


class _HashingFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Write what is buffered."""
        self._file.flush()


def write_temporary(path: Path, facts: Mapping[str, Any], tensors: Any) -> str:
    """Write a file under its temporary name, `path` and TEMPORARY, and sync it.

    Args:
        path: the name that it is to get.
        facts: what JSON can hold.
        tensors: nested dicts and lists of tensors, numbers and strings.

    Returns:
        The hash.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(b" " * _FIRST_LINE)
            hashing = _HashingFile(file)
            hashing.write(json.dumps(facts).encode() + b"\n")
            _save(tensors, hashing)
            file.seek(0)
            digest = hashing.hash.hexdigest()
            file.write(_MAGIC + digest.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
    return digest


def _save(tensors: Any, file: _HashingFile) -> None:
    """Call torch.save, which turns an OSError of the file into a RuntimeError of its own."""
    try:
        torch.save(tensors, file)  # type: ignore[arg-type]
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise


def rename_temporary(path: Path) -> None:
    """Give a temporary file its name, in place of an older file of that name, and sync the folder.

    Raises:
        OSError: the folder refuses.
    """
    temporary_name(path).replace(path)
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Return the name of a file while it is written."""
    return path.with_name(path.name + TEMPORARY)


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a file; the hash is not checked.

    Raises:
        DamagedError: they cannot be read.
    """
    try:
        with path.open("rb") as file:
            _read_first_line(file)
            return _parse(file.readline())
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error


def read_file(path: Path) -> tuple[dict[str, Any], Any, str]:
    """Read facts, tensors (on the host) and hash of a file, and check that they fit.

    Raises:
        DamagedError: the file is not what was written.
    """
    try:
        with path.open("rb") as file:
            expected = _read_first_line(file)
            line, rest = file.readline(), file.read()
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error
    digest = hashlib.sha256(line)
    digest.update(rest)
    if digest.hexdigest() != expected:
        raise DamagedError("its hash does not fit: it was cut short or changed")
    try:
        tensors = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise DamagedError("it holds something else than tensors, numbers and text") from error
    return _parse(line), tensors, expected


def _read_first_line(file: BinaryIO) -> str:
    """Read the hash that a file says it has."""
    line = file.read(_FIRST_LINE)
    if not line.startswith(_MAGIC):
        raise DamagedError("it is no checkpoint")
    return line[len(_MAGIC) :].decode("ascii", errors="replace").rstrip("\n")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(line)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise DamagedError("its facts are no JSON object")
    return facts
