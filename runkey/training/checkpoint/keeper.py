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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runkey.training.checkpoint.content import Content
from runkey.training.checkpoint.folder import CheckpointFolder, Fingerprint
from runkey.training.checkpoint.host_copy import HostCopy, is_finite
from runkey.training.checkpoint.interval import Interval
from runkey.training.checkpoint.names import Saved

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
