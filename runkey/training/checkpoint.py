"""Checkpoints: everything a training needs to resume exactly, written while training goes on.

    RUNKEY CHECKPOINT 1 <sha256 of all that follows the first line>
    {"step": 120, ...}                          facts: one line of JSON, read without the rest
    <what torch.save wrote>

They are taken at the boundary of an optimizer step. Nothing about random numbers, loader or
schedule is in them: all of that is a function of seed, epoch and step.

A file gets its name only when it is whole and on disk: it is written under another name, synced,
and renamed. The hash is for what happens later: a bad disk, a copy that was cut short.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from runkey.files import open_plain, parse_json, sync_folder
from runkey.training.tensors import all_finite, map_tensors, named_tensors

logger = logging.getLogger(__name__)


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
    """List the checkpoints in a folder, the newest first; none if there is no such folder.

    Of the same step, an anchor comes last: it was saved before the epoch's evaluation.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = (_NAME.fullmatch(path.name) for path in paths)
    found = [CheckpointName(int(m.group(2)), m.group(1) == "anchor") for m in matches if m]
    return sorted(found, key=lambda one: (one.step, not one.is_anchor), reverse=True)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files in a training's folder that it could resume from, and that no other may miss."""

    step: int
    names: tuple[str, ...]
    """Best weights, the anchor to roll back to, and last the newest checkpoint."""


def newest_files(folder: Path) -> CheckpointFiles | None:
    """List what the newest checkpoint in a folder needs; None: there is none that can be read.

    Another thread may remove the files as soon as there are newer ones. Hashes are not checked.
    """
    found = find_checkpoints(folder)
    if not found:
        return None
    newest = found[0]
    anchors = [one for one in found if one.is_anchor and one.step <= newest.step]
    needed = [*anchors[:1], newest] if not newest.is_anchor else [newest]
    best: list[str] = []
    for one in needed:
        try:
            name = read_facts(folder / one.name)["best"]
        except (DamagedError, KeyError):
            return None
        best += [name] if name and name not in best else []
    return CheckpointFiles(newest.step, (*best, *(one.name for one in needed)))


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


# Writing and reading a file.

_MAGIC = b"RUNKEY CHECKPOINT 1 "
_FIRST_LINE = len(_MAGIC) + 64 + 1


class DamagedError(Exception):
    """A file is not whole, or not what was looked for; the text says why."""


def write_file(path: Path, facts: Mapping[str, Any], tensors: Any) -> tuple[str, str]:
    """Write a file under a temporary name, sync it, and give it its own; return its name and hash.

    HASH in the path stands for the hash's beginning; an older file of that name is replaced.
    `facts` are what JSON can hold, `tensors` nested dicts and lists of tensors, numbers and text.
    If that raises, nothing is left of the file.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("w+b") as file:
            file.write(b" " * _FIRST_LINE + json.dumps(facts).encode() + b"\n")
            try:
                torch.save(tensors, file)
            except RuntimeError as error:  # torch's own, on its way out of one of the file
                raise error.__context__ or error from None
            file.seek(_FIRST_LINE)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            file.write(_MAGIC + digest.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        path = path.with_name(path.name.replace("HASH", digest[:12]))
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return path.name, digest


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a file, or raise DamagedError; the hash is not checked."""
    with _opened(path) as (file, _):
        return _parse(file.readline())


def read_file(path: Path) -> tuple[dict[str, Any], Any, str]:
    """Read facts, tensors (on the host) and hash of a file; DamagedError if they do not fit."""
    with _opened(path) as (file, expected):
        line, rest = file.readline(), file.read()
    digest = hashlib.sha256(line)
    digest.update(rest)
    if digest.hexdigest() != expected:
        raise DamagedError("its hash does not fit: it was cut short or changed")
    try:
        tensors = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise DamagedError("it holds something else than tensors, numbers and text") from error
    return _parse(line), tensors, expected


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """Open a file behind its first line; yield it and the hash that it says it has."""
    try:
        with open_plain(path) as file:
            line = file.read(_FIRST_LINE)
            if not line.startswith(_MAGIC):
                raise DamagedError("it is no checkpoint")
            yield file, line[len(_MAGIC) :].decode("ascii", errors="replace").rstrip("\n")
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error


def _parse(line: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        facts = parse_json(line)
        if isinstance(facts, dict):
            return facts
    raise DamagedError("its facts are no JSON object")


# What trains, which checkpoints name.

Fingerprint = Mapping[str, str | int]
"""What trains: `key`, `micro_batch`, `world_size`, `device` (cpu, cuda), `precision`."""


def newest_fingerprint(path: Path) -> Fingerprint | None:
    """Read what trained the newest readable checkpoint in a folder; None: there is none.

    Cheap and unchecked: for what has to be decided before a training can be built.
    """
    for name in find_checkpoints(path):
        with suppress(DamagedError, KeyError):
            fingerprint: Fingerprint = read_facts(path / name.name)["fingerprint"]
            return fingerprint
    return None


def differences(theirs: Fingerprint, ours: Fingerprint) -> str:
    """Describe what differs: `micro_batch 4 -> 2, device cpu -> cuda`; empty if nothing does."""
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    return ", ".join(f"{name} {theirs.get(name)} -> {ours[name]}" for name in differing)


# Copies of tensors in host memory that is reused.


class HostCopy:
    """Copies nested dicts and lists of tensors to the host; each copy overwrites the one before."""

    def __init__(self) -> None:
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
            self._places, self._shapes = [_host_place(tensor) for tensor in tensors], shapes
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
        """Wait for the last copy, in any thread; return the seconds that a GPU copied for, or 0."""
        if self._events is None:
            return 0.0
        begun, ended = self._events
        ended.synchronize()
        milliseconds: float = begun.elapsed_time(ended)  # type: ignore[no-untyped-call]
        return milliseconds / 1000


def _host_place(tensor: Tensor) -> Tensor:
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    except RuntimeError:  # hosts limit what can be page-locked; other memory is only slower
        return torch.empty_like(tensor, device="cpu")


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


# When a checkpoint is due.

SHARE = 0.01
"""Share of the training time that checkpoints may cost."""
SHORTEST_SECONDS = 15.0
"""Minimum seconds between checkpoints."""


class Interval:
    """The time between checkpoints; `auto` derives it from what the last one cost."""

    def __init__(
        self,
        seconds: float | Literal["auto"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start now.

        A fixed time of 0 is after every step. auto: the first one at once, so that its cost is
        known, the next ones as rarely as SHARE asks for.
        """
        self._clock = clock
        self._is_fixed = seconds != "auto"
        self.seconds = 0.0 if seconds == "auto" else float(seconds)
        self._last = clock()

    @property
    def is_each_step(self) -> bool:
        """Whether every step is to have one."""
        return self._is_fixed and self.seconds == 0

    def is_over(self) -> bool:
        """Return True if the next checkpoint is due."""
        return self._clock() - self._last >= self.seconds

    def restart(self) -> None:
        """Start the interval after a checkpoint that begins now."""
        self._last = self._clock()

    def set_cost(self, seconds: float) -> None:
        """Take note of what one cost: the time that training waited, or could not use."""
        if not self._is_fixed:
            self.seconds = max(SHORTEST_SECONDS, seconds / SHARE)


# The checkpoints of a training.

_RETRY_SECONDS = 30.0
"""Before the next attempt, after one that failed."""


class FolderCheckpoints:
    """Files `step-*.ckpt`, `anchor-*.ckpt`, `best-*.pt` in a folder that this process holds.

    Saving never raises. Whatever goes wrong is logged once; training goes on, older checkpoints
    stay, and the next attempt follows later.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Fingerprint,
        *,
        interval: Interval,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        """Remove what a killed process has left half written in `path`, the folder of a training.

        `fingerprint` says what trains; another `key` is refused, the rest only logged.
        """
        self.path = path
        self.newest: int | None = None
        """Step of the newest checkpoint that training could resume from; None: there is none."""
        self._fingerprint = dict(fingerprint)
        self._interval = interval
        self._retry_seconds = retry_seconds
        self._retry_at: float | None = None
        """Set when one could not be written, until the next one is."""
        self._asked: float | None = None
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._best: tuple[Mapping[str, Tensor], str, str] | None = None
        """Best weights that are on disk, name and hash of their file."""
        try:
            for half_written in path.glob("*" + TEMPORARY):
                half_written.unlink()
        except OSError as error:
            self._fail(error.strerror or str(error))

    def due(self) -> bool:
        """Return True if one is to be saved at this boundary; cheap, asked after every step."""
        waits = self._retry_at is not None and time.monotonic() < self._retry_at
        busy = self._thread is not None and self._thread.is_alive()
        if waits or (busy and not self._interval.is_each_step) or not self._interval.is_over():
            return False
        self._asked = time.perf_counter()
        return True

    def save(self, checkpoint: Checkpoint, *, wait: bool = False, anchor: bool = False) -> None:
        """Copy the tensors and begin to write; the caller may go on changing them.

        `wait` until it is on disk; an `anchor` is kept for rollbacks.
        """
        started, self._asked = self._asked or time.perf_counter(), None
        self.finish()
        self._interval.restart()
        tensors = self._copy.take(
            {
                "state": checkpoint.state,
                "parts": checkpoint.parts,
                "position": dict(checkpoint.position),
            }
        )
        stall = time.perf_counter() - started
        name = CheckpointName(checkpoint.step, anchor)
        self._thread = threading.Thread(
            target=self._write,
            args=(name, tensors, checkpoint.best_weights, stall),
            name="checkpoint",
        )
        self._thread.start()
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait until what was saved is on disk, or could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def load(self) -> Checkpoint | None:
        """Load the newest checkpoint that is whole and of this key; None: there is none."""
        checkpoint = self._load(find_checkpoints(self.path))
        self.newest = None if checkpoint is None else checkpoint.step
        return checkpoint

    def load_anchor(self, step: int) -> Checkpoint | None:
        """Load the newest whole anchor at or before a step; None: there is none."""
        self.finish()
        names = find_checkpoints(self.path)
        return self._load([one for one in names if one.is_anchor and one.step <= step])

    def _load(self, names: list[CheckpointName]) -> Checkpoint | None:
        for name in names:
            path = self.path / name.name
            try:
                return self.read(path)
            except DamagedError as error:
                logger.info(f"{path}: {error}; the one before it is used, if there is one")
                # Else it would count as one of the two newest, which are kept.
                with suppress(OSError):
                    path.rename(path.with_name(path.name + BAD))
        return None

    def read(self, path: Path) -> Checkpoint:
        """Read a checkpoint and its best weights; DamagedError if one is not whole, or not ours."""
        facts, tensors, _ = read_file(path)
        if not facts.keys() >= {"step", "fingerprint", "best", "best_hash"}:
            raise DamagedError("it is another kind of file")
        theirs, best_name = facts["fingerprint"], facts["best"]
        if theirs["key"] != self._fingerprint["key"]:
            raise DamagedError(f"it is of another key, {theirs['key']}")
        best: dict[str, Tensor] = {}
        if best_name:
            try:
                _, best, digest = read_file(self.path / best_name)
            except DamagedError as error:
                raise DamagedError(f"its best weights, {best_name}: {error}") from error
            if digest != facts["best_hash"]:
                raise DamagedError(
                    f"its best weights, {best_name}, are not those that were written"
                )
            self._best = best, best_name, digest
        changes = differences(theirs, self._fingerprint)
        return Checkpoint(facts["step"], **tensors, best_weights=best, changes=changes)

    # What follows runs in the thread.

    def _write(
        self, name: CheckpointName, tensors: Any, best: Mapping[str, Tensor], stall: float
    ) -> None:
        stall += self._copy.wait()
        if not all_finite(tensor for _, tensor in named_tensors(tensors["parts"])):
            self._fail("weights or moments are not finite")
            return
        try:
            self._write_files(name, tensors, best)
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        self.newest = name.step
        # On a CPU, what the thread computes is taken from the training.
        shares_cpu = self._fingerprint["device"] == "cpu"
        self._interval.set_cost(stall + (time.thread_time() if shares_cpu else 0.0))
        if self._retry_at is not None:
            self._retry_at = None
            logger.info(f"{self.path}: checkpoints are written again, now of step {name.step}")

    def _write_files(self, name: CheckpointName, tensors: Any, best: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, its best weights first if they are new; remove obsolete files."""
        if best and (self._best is None or self._best[0] is not best):
            # The hash is in the name, so that what the name stands for never changes.
            path = self.path / f"best-{tensors['state']['best']['step']:08d}-HASH.pt"
            self._best = best, *write_file(path, {"key": self._fingerprint["key"]}, dict(best))
        best_name, digest = self._best[1:] if best and self._best else (None, None)
        facts = {
            "step": name.step,
            "fingerprint": self._fingerprint,
            "best": best_name,
            "best_hash": digest,
        }
        write_file(self.path / name.name, facts, tensors)
        names = find_checkpoints(self.path)
        removed = obsolete(names)
        for one in removed:
            (self.path / one.name).unlink()
        used = {self._best[1]} if self._best else set()
        for one in set(names) - set(removed):
            with suppress(DamagedError):  # useless, and so is what it names
                used.add(read_facts(self.path / one.name)["best"])
        for file in self.path.glob("best-*.pt"):
            if file.name not in used:
                file.unlink()

    def _fail(self, why: str) -> None:
        if self._retry_at is None:
            newest = (
                "there is none" if self.newest is None else f"the newest is of step {self.newest}"
            )
            logger.info(
                f"{self.path}: no checkpoint is written ({why}); training goes on, {newest}"
            )
        self._retry_at = time.monotonic() + self._retry_seconds
