"""Checkpoints in a folder, written by a thread while training goes on.

    checkpoints = FolderCheckpoints(folder, fingerprint, interval=Interval("auto"))
    checkpoint = checkpoints.load()
    ...
    if checkpoints.due(step):
        checkpoints.save(checkpoint)
    checkpoints.finish()

Whatever goes wrong in writing is logged once; training goes on, older checkpoints stay, and the
next attempt follows later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from runkey.files import sync_folder
from runkey.training.checkpoint.file import (
    BAD,
    TEMPORARY,
    Checkpoint,
    CheckpointName,
    DamagedError,
    HostCopy,
    find_checkpoints,
    obsolete,
    read_facts,
    read_file,
    rename_temporary,
    temporary_name,
    write_temporary,
)
from runkey.training.tensors import all_finite, named_tensors

logger = logging.getLogger(__name__)

Fingerprint = Mapping[str, str | int]
"""What trains: `key`, `micro_batch`, `world_size`, `device` (cpu, cuda), `precision`."""

_FACTS = {"step", "fingerprint", "best", "best_hash"}


class CheckpointFolder:
    """Files `step-*.ckpt`, `anchor-*.ckpt`, `best-*.pt`, written by one process (see `locked`)."""

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        """Args: path: the folder. fingerprint: another `key` is refused, the rest only logged."""
        self.path = path
        self._fingerprint = dict(fingerprint)
        self._best: tuple[Mapping[str, Tensor], str, str] | None = None
        """Best weights that are on disk, name and hash of their file."""

    def clear(self) -> None:
        """Remove files that a killed process has left half written.

        Raises:
            OSError: the folder cannot be written.
        """
        for path in self.path.glob("*" + TEMPORARY):
            path.unlink()

    def write(
        self, name: CheckpointName, tensors: Any, best: Mapping[str, Tensor], best_step: int
    ) -> None:
        """Write a checkpoint, the best weights first if they are new; remove obsolete files.

        Args:
            name: of the checkpoint.
            tensors: `state`, `parts` and `position` of a `Checkpoint`.
            best: its best weights; empty: none yet.
            best_step: their step.

        Raises:
            OSError: it cannot be written; what was there still is.
        """
        if best and (self._best is None or self._best[0] is not best):
            self._best = best, *self._write_best(best, best_step)
        best_name, digest = self._best[1:] if best and self._best else (None, None)
        facts = {
            "step": name.step,
            "fingerprint": self._fingerprint,
            "best": best_name,
            "best_hash": digest,
        }
        path = self.path / name.name
        write_temporary(path, facts, tensors)
        rename_temporary(path)
        self._remove_obsolete()

    def _write_best(self, best: Mapping[str, Tensor], step: int) -> tuple[str, str]:
        """Write the best weights; return name (with the hash, so it never changes) and hash."""
        unnamed = self.path / "best.pt"
        digest = write_temporary(unnamed, {"key": self._fingerprint["key"]}, dict(best))
        name = f"best-{step:08d}-{digest[:12]}.pt"
        temporary_name(unnamed).replace(self.path / name)
        sync_folder(self.path)
        return name, digest

    def _remove_obsolete(self) -> None:
        names = find_checkpoints(self.path)
        removed = obsolete(names)
        for one in removed:
            (self.path / one.name).unlink()
        used = {self._best[1]} if self._best else set()
        for one in set(names) - set(removed):
            with suppress(DamagedError):  # useless, and so is what it names
                used.add(read_facts(self.path / one.name)["best"])
        for path in self.path.glob("best-*.pt"):
            if path.name not in used:
                path.unlink()

    def newest(self, wanted: Callable[[CheckpointName], bool]) -> Checkpoint | None:
        """Load the newest checkpoint that is whole and of this key; None: there is none.

        Args:
            wanted: which to look at.
        """
        for name in filter(wanted, find_checkpoints(self.path) if self.path.is_dir() else []):
            path = self.path / name.name
            try:
                return self._read(name)
            except DamagedError as error:
                logger.info(f"{path}: {error}; the one before it is used, if there is one")
                # Else it would count as one of the two newest, which are kept.
                with suppress(OSError):
                    path.rename(path.with_name(path.name + BAD))
        return None

    def _read(self, name: CheckpointName) -> Checkpoint:
        facts, tensors, _ = read_file(self.path / name.name)
        if not facts.keys() >= _FACTS:
            raise DamagedError("it is another kind of file")
        theirs = facts["fingerprint"]
        if theirs["key"] != self._fingerprint["key"]:
            raise DamagedError(f"it is of another key, {theirs['key']}")
        best: dict[str, Tensor] = {}
        if facts["best"]:
            best = self._read_best(facts["best"], facts["best_hash"])
            self._best = best, facts["best"], facts["best_hash"]
        return Checkpoint(
            step=name.step,
            state=tensors["state"],
            parts=tensors["parts"],
            position=tensors["position"],
            best_weights=best,
            changes=differences(theirs, self._fingerprint),
        )

    def _read_best(self, name: str, digest: str) -> dict[str, Tensor]:
        try:
            _, weights, found = read_file(self.path / name)
        except DamagedError as error:
            raise DamagedError(f"its best weights, {name}: {error}") from error
        if found != digest:
            raise DamagedError(f"its best weights, {name}, are not those that were written")
        return dict(weights)


def newest_fingerprint(path: Path) -> Fingerprint | None:
    """Read what trained the newest readable checkpoint in a folder; None: there is none.

    Cheap and unchecked: for what has to be decided before a training can be built.
    """
    for name in find_checkpoints(path) if path.is_dir() else []:
        with suppress(DamagedError, KeyError):
            fingerprint: Fingerprint = read_facts(path / name.name)["fingerprint"]
            return fingerprint
    return None


def differences(theirs: Fingerprint, ours: Fingerprint) -> str:
    """Describe what differs: `micro_batch 4 -> 2, device cpu -> cuda`; empty if nothing does."""
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    return ", ".join(f"{name} {theirs.get(name)} -> {ours[name]}" for name in differing)


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

        Args:
            seconds: a fixed time, 0: after every step; auto: the first one at once, so that its
                cost is known, the next ones as rarely as SHARE asks for.
            clock: in seconds.
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


_RETRY_SECONDS = 30.0
"""Before the next attempt, after one that failed."""
_FINITE = ("model", "ema", "optimizer")
"""Parts that are not written when a number in them is not finite."""


class FolderCheckpoints:
    """Implements `Checkpoints` in a folder that this process holds, see `locked`."""

    def __init__(
        self,
        path: Path,
        fingerprint: Fingerprint,
        *,
        interval: Interval,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        """Remove what a killed process has left half written.

        Args:
            path: the folder of one training.
            fingerprint: what trains.
            interval: when a checkpoint is due.
            retry_seconds: after a failure.
        """
        self.path: Path | None = path
        self._folder = CheckpointFolder(path, fingerprint)
        # On a CPU, what the thread computes is taken from the training.
        self._shares_cpu = fingerprint["device"] == "cpu"
        self._interval = interval
        self._retry_seconds = retry_seconds
        self._retry_at = 0.0
        self._failed = False
        self._asked: float | None = None
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self.newest: int | None = None
        """Step of the newest checkpoint on disk; None: there is none."""
        try:
            self._folder.clear()
        except OSError as error:
            self._fail(error.strerror or str(error))

    def due(self, step: int) -> bool:  # noqa: ARG002  the time decides
        """Return True if one is to be saved at this boundary."""
        waits = self._failed and time.monotonic() < self._retry_at
        busy = self._thread is not None and self._thread.is_alive()
        if waits or (busy and not self._interval.is_each_step) or not self._interval.is_over():
            return False
        self._asked = time.perf_counter()
        return True

    def save(self, checkpoint: Checkpoint, *, wait: bool = False, anchor: bool = False) -> None:
        """Copy the tensors and begin to write; see `Checkpoints.save`."""
        started, self._asked = self._asked or time.perf_counter(), None
        self.finish()
        self._interval.restart()
        position = dict(checkpoint.position)
        tensors = self._copy.take(
            {"state": checkpoint.state, "parts": checkpoint.parts, "position": position}
        )
        stall = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write,
            args=(CheckpointName(checkpoint.step, anchor), tensors, checkpoint, stall),
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
        checkpoint = self._folder.newest(lambda _: True)
        self.newest = None if checkpoint is None else checkpoint.step
        return checkpoint

    def load_anchor(self, step: int) -> Checkpoint | None:
        """Load the newest whole anchor at or before a step; None: there is none."""
        self.finish()
        return self._folder.newest(lambda name: name.is_anchor and name.step <= step)

    # What follows runs in the thread.

    def _write(
        self, name: CheckpointName, tensors: Any, checkpoint: Checkpoint, stall: float
    ) -> None:
        stall += self._copy.wait()
        # Not all parts: a history of gradient norms is NaN where there is none yet.
        parts = [tensors["parts"].get(part) for part in _FINITE]
        if not all_finite(tensor for _, tensor in named_tensors(parts)):
            self._fail("weights or moments are not finite")
            return
        best = checkpoint.state["best"]
        try:
            self._folder.write(name, tensors, checkpoint.best_weights, best["step"] if best else 0)
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        self.newest = name.step
        self._interval.set_cost(stall + (time.thread_time() if self._shares_cpu else 0.0))
        if self._failed:
            self._failed = False
            logger.info(
                f"{self._folder.path}: checkpoints are written again, now of step {name.step}"
            )

    def _fail(self, why: str) -> None:
        self._retry_at = time.monotonic() + self._retry_seconds
        if not self._failed:
            self._failed = True
            newest = (
                "there is none" if self.newest is None else f"the newest is of step {self.newest}"
            )
            logger.info(
                f"{self._folder.path}: no checkpoint is written ({why}); training goes on, {newest}"
            )
