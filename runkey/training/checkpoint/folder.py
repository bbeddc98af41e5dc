"""Checkpoints that are written by a thread while training goes on.

    checkpoints = FolderCheckpoints(folder, fingerprint, say, interval=Interval("auto"))
    content = checkpoints.load()
    ...
    if checkpoints.due(step):
        checkpoints.save(content)
    checkpoints.finish()

Whatever goes wrong in writing is said once; training goes on, older checkpoints stay, and it is
tried again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from runkey.training.checkpoint.file import (
    BAD,
    TEMPORARY,
    Content,
    DamagedError,
    HostCopy,
    Saved,
    best_name,
    find_saved,
    give_name,
    is_finite,
    obsolete,
    read_facts,
    read_file,
    sync_folder,
    temporary_name,
    write_temporary,
)

# The checkpoints in a training's folder, written and read at once; `keeper` does it meanwhile.


Fingerprint = Mapping[str, str | int]
"""What trains: `key`, `micro_batch`, `world_size`, `device` (cpu, cuda), `precision`."""

_FACTS = {"step", "fingerprint", "best", "best_hash"}


class CheckpointFolder:
    """Files `step-*.ckpt`, `anchor-*.ckpt`, `best-*.pt`.  One process writes, see `locked`."""

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        """Args: path: the folder.  fingerprint: another `key` is refused, the rest only told."""
        self.path = path
        self._fingerprint = dict(fingerprint)
        self._best: tuple[Mapping[str, Tensor], str, str] | None = None
        """Best weights that are on disk, name and hash of their file."""

    def clear(self) -> None:
        """Remove what a killed process has left half written.

        Raises:
            OSError: the folder cannot be written.
        """
        for path in self.path.glob("*" + TEMPORARY):
            path.unlink()

    def write(self, saved: Saved, tensors: Any, best: Mapping[str, Tensor], best_step: int) -> None:
        """Write a checkpoint, the best weights first if they are new; remove what may go.

        Args:
            saved: which.
            tensors: `state`, `parts` and `position` of a `Content`.
            best: its best weights; empty: none yet.
            best_step: the step that they are of.

        Raises:
            OSError: it cannot be written; what was there still is.
        """
        if best and (self._best is None or self._best[0] is not best):
            self._best = best, *self._write_best(best, best_step)
        name, digest = self._best[1:] if best and self._best else (None, None)
        facts = {
            "step": saved.step,
            "fingerprint": self._fingerprint,
            "best": name,
            "best_hash": digest,
        }
        path = self.path / saved.name
        write_temporary(path, facts, tensors)
        give_name(path)
        self._remove_obsolete()

    def _write_best(self, best: Mapping[str, Tensor], step: int) -> tuple[str, str]:
        """Name and hash of the file, which is named for its content: it never changes."""
        unnamed = self.path / "best.pt"
        digest = write_temporary(unnamed, {"key": self._fingerprint["key"]}, dict(best))
        name = best_name(step, digest)
        temporary_name(unnamed).replace(self.path / name)
        sync_folder(self.path)
        return name, digest

    def _remove_obsolete(self) -> None:
        saved = find_saved(self.path)
        for one in obsolete(saved):
            (self.path / one.name).unlink()
        used = {self._best[1]} if self._best else set()
        for one in set(saved) - set(obsolete(saved)):
            with suppress(DamagedError):  # it can be of no use, nor what it names
                used.add(read_facts(self.path / one.name)["best"])
        for path in self.path.glob("best-*.pt"):
            if path.name not in used:
                path.unlink()

    def newest(self, wanted: Callable[[Saved], bool], say: Callable[[str], None]) -> Content | None:
        """The newest checkpoint that is whole and of this key; None: there is none.

        Args:
            wanted: which to look at.
            say: told, in one line each, which could not be used, and why.
        """
        for saved in filter(wanted, find_saved(self.path) if self.path.is_dir() else []):
            path = self.path / saved.name
            try:
                return self._read(saved)
            except DamagedError as error:
                say(f"{path}: {error}; the one before it is used, if there is one")
                # Else it would count as one of the two newest, which are kept.
                with suppress(OSError):
                    path.rename(path.with_name(path.name + BAD))
        return None

    def _read(self, saved: Saved) -> Content:
        facts, tensors, _ = read_file(self.path / saved.name)
        if not facts.keys() >= _FACTS:
            raise DamagedError("it is another kind of file")
        theirs = facts["fingerprint"]
        if theirs["key"] != self._fingerprint["key"]:
            raise DamagedError(f"it is of another key, {theirs['key']}")
        best: dict[str, Tensor] = {}
        if facts["best"]:
            best = self._read_best(facts["best"], facts["best_hash"])
            self._best = best, facts["best"], facts["best_hash"]
        return Content(
            step=saved.step,
            state=tensors["state"],
            parts=tensors["parts"],
            position=tensors["position"],
            best_weights=best,
            changes=_changes(theirs, self._fingerprint),
        )

    def _read_best(self, name: str, digest: str) -> dict[str, Tensor]:
        try:
            _, weights, found = read_file(self.path / name)
        except DamagedError as error:
            raise DamagedError(f"its best weights, {name}: {error}") from error
        if found != digest:
            raise DamagedError(f"its best weights, {name}, are others than were written")
        return dict(weights)


def newest_fingerprint(path: Path) -> Fingerprint | None:
    """What trained the newest checkpoint in a folder that can be read; None: there is none.

    Cheap and unchecked: for what has to be decided before a training can be built.
    """
    for saved in find_saved(path) if path.is_dir() else []:
        with suppress(DamagedError, KeyError):
            fingerprint: Fingerprint = read_facts(path / saved.name)["fingerprint"]
            return fingerprint
    return None


def _changes(theirs: Fingerprint, ours: Fingerprint) -> str:
    """`micro_batch 4 -> 2, device cpu -> cuda`; empty if all is the same."""
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    return ", ".join(f"{name} {theirs.get(name)} -> {ours[name]}" for name in differing)


# When the next checkpoint is due: so often that all together cost at most 1% of the time.


SHARE = 0.01
"""Part of the time that checkpoints may cost."""
SHORTEST_SECONDS = 15.0
"""Between two of them, however cheap: nobody minds to lose so little."""


class Interval:
    """The time between checkpoints; with `auto` it follows from what the last one cost."""

    def __init__(
        self,
        seconds: float | Literal["auto"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start now.

        Args:
            seconds: a fixed time, 0: after every step; auto: the first one at once, so that its
                cost is known, the next ones as seldom as the cost asks for.
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
        """Whether the next one is due."""
        return self._clock() - self._last >= self.seconds

    def restart(self) -> None:
        """One is begun now."""
        self._last = self._clock()

    def set_cost(self, seconds: float) -> None:
        """What one cost: time that training waited, or could not use."""
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
        say: Callable[[str], None],
        *,
        interval: Interval,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        """Clear away what a killed process has left half written.

        Args:
            path: the folder of one training.
            fingerprint: what trains.
            say: told, in one line each, what goes wrong.
            interval: when a checkpoint is due.
            retry_seconds: after a failure.
        """
        self.path: Path | None = path
        self._folder = CheckpointFolder(path, fingerprint)
        # On a CPU, what the thread computes is taken from the training.
        self._shares_cpu = fingerprint["device"] == "cpu"
        self._say = say
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
        """Whether one is to be saved at this boundary."""
        waits = self._failed and time.monotonic() < self._retry_at
        busy = self._thread is not None and self._thread.is_alive()
        if waits or (busy and not self._interval.is_each_step) or not self._interval.is_over():
            return False
        self._asked = time.perf_counter()
        return True

    def save(self, content: Content, *, wait: bool = False, anchor: bool = False) -> None:
        """Copy the content and begin to write it; see `Checkpoints.save`."""
        started, self._asked = self._asked or time.perf_counter(), None
        self.finish()
        self._interval.restart()
        tensors = self._copy.take(
            {"state": content.state, "parts": content.parts, "position": dict(content.position)}
        )
        stall = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write,
            args=(Saved(content.step, anchor), tensors, content, stall),
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

    def load(self) -> Content | None:
        """The newest checkpoint that is whole and of this key; None: there is none."""
        content = self._folder.newest(lambda _: True, self._say)
        self.newest = None if content is None else content.step
        return content

    def load_anchor(self, step: int) -> Content | None:
        """The newest whole anchor at or before a step; None: there is none."""
        self.finish()
        return self._folder.newest(lambda saved: saved.is_anchor and saved.step <= step, self._say)

    # What follows runs in the thread.

    def _write(self, saved: Saved, tensors: Any, content: Content, stall: float) -> None:
        stall += self._copy.wait()
        # Not all parts: a history of gradient norms is NaN where there is none yet.
        if not is_finite([tensors["parts"].get(name) for name in _FINITE]):
            self._fail("weights or moments are not finite")
            return
        best = content.state["best"]
        try:
            self._folder.write(saved, tensors, content.best_weights, best["step"] if best else 0)
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        self.newest = saved.step
        self._interval.set_cost(stall + (time.thread_time() if self._shares_cpu else 0.0))
        if self._failed:
            self._failed = False
            self._say(
                f"{self._folder.path}: checkpoints are written again, now of step {saved.step}"
            )

    def _fail(self, why: str) -> None:
        self._retry_at = time.monotonic() + self._retry_seconds
        if not self._failed:
            self._failed = True
            newest = (
                "there is none" if self.newest is None else f"the newest is of step {self.newest}"
            )
            self._say(
                f"{self._folder.path}: no checkpoint is written ({why}); training goes on, {newest}"
            )
