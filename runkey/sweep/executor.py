"""Executors: what starts trials. This machine's is here; Ray's and Slurm's follow the protocol.

The driver (`runkey.sweep.driver`) asks `has_room`, calls `submit`, and calls `poll` every second or
so. A trial is one `runkey trial` process, safe to start anywhere and any number of times, so an
executor may repeat it on another machine whenever it likes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runkey.errors import TRY_ELSEWHERE
from runkey.sweep.packing import Request, place
from runkey.units import MIB

_PATIENCE = 60.0
"""Seconds that a cancelled trial has to write its checkpoint and to end."""
_MOST_SAID = 1 * MIB
"""Bytes at the end of a log that are looked through for its last line."""


@dataclass(frozen=True)
class Trial:
    """One point of a sweep."""

    key: str
    """Of the training."""
    commit: str
    """Snapshot that it runs."""
    changes: tuple[str, ...]
    """`NAME=VALUE` for each parameter that differs from the snapshot's params.yaml."""
    peak_bytes: int | None = None
    """Upper bound of the memory that it takes on its device; None: not predicted yet."""
    wait: bool = True
    """Wait while another process trains the key; False: end with code 75."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of `python -m runkey`, in any clone of the repository."""
        changes = (part for change in self.changes for part in ("-S", change))
        return ("trial", self.commit, *changes, "--wait" if self.wait else "--no-wait")

    @property
    def label(self) -> str:
        """For messages: `lr=0.0003 seed=1`."""
        return " ".join(self.changes) or "params.yaml as it is"


@dataclass(frozen=True)
class Ended:
    """A trial that is over."""

    key: str
    code: int
    """0: its run is finished; 75: try again, maybe elsewhere (a lost machine is that, too);
    anything else: do not repeat it."""
    said: str = ""
    """Its last line; where it failed, the error."""


class Executor(Protocol):
    """Starts trials somewhere."""

    place: str
    """For messages: `this machine`, `Ray at 10.0.0.1:6379`."""
    is_remote: bool
    """Whether trials run in other clones, which get the snapshot from the git remote."""

    def capacity(self) -> int:
        """Return how many trials can run at once, those that run included; at least 1."""

    def has_room(self, trial: Trial) -> bool:
        """Return True if the trial may be submitted now. An engine with a queue always does."""

    def submit(self, trial: Trial) -> None:
        """Start a trial, or queue it, and return at once; its key must not be running here."""

    def poll(self) -> list[Ended]:
        """Return the trials that ended since the last call; wait for nothing."""

    def cancel(self, key: str) -> None:
        """Ask a trial to end (SIGTERM, so that it writes a checkpoint); `poll` reports it."""

    def close(self) -> None:
        """Cancel what still runs, wait for it, and leave the engine."""


@dataclass
class _Started:
    trial: Trial
    process: subprocess.Popen[bytes]
    log: Path
    device: str


class LocalExecutor:
    """Runs trials as processes of this machine, as many as its memory holds."""

    place, is_remote = "this machine", False

    def __init__(
        self,
        root: Path,
        logs: Path,
        *,
        jobs: int,
        devices: Mapping[str, int],
        peak_of: Callable[[str], int | None] = lambda _: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            root: the checkout to run in.
            logs: folder for what each trial prints, `<key>.log`.
            jobs: most trials at once.
            devices: what all of them may take on each device, in bytes, by its name in
                CUDA_VISIBLE_DEVICES; "" is the only device.
            peak_of: the bound of a running trial whose own was not known when it was submitted.
            environment: variables of the trials; None: this process's.
        """
        self._root, self._logs, self._jobs, self._devices = root, logs, jobs, devices
        self._peak_of, self._environment = peak_of, environment
        self._running: dict[str, _Started] = {}

    def capacity(self) -> int:
        """See `Executor`."""
        return self._jobs

    def has_room(self, trial: Trial) -> bool:
        """Return True if a device is empty, or all bounds together are within what one has."""
        return self._device_for(trial) is not None

    def _device_for(self, trial: Trial) -> str | None:
        """Return the device to start a trial on now, None if there is none."""
        running: dict[str, list[int | None]] = {name: [] for name in self._devices}
        for key, one in self._running.items():
            running[one.device].append(one.trial.peak_bytes or self._peak_of(key))
        if len(self._running) >= self._jobs:
            return None
        if trial.peak_bytes is not None:
            free = {
                name: self._devices[name] - sum(peak or self._devices[name] for peak in peaks)
                for name, peaks in running.items()
            }
            count = {name: len(peaks) for name, peaks in running.items()}
            if placed := place([Request(trial.key, trial.peak_bytes)], free, count):
                return placed[0][1]
        return next((name for name, peaks in running.items() if not peaks), None)

    def submit(self, trial: Trial) -> None:
        """See `Executor`."""
        self._logs.mkdir(parents=True, exist_ok=True)
        log, device = self._logs / f"{trial.key}.log", self._device_for(trial) or ""
        environment = os.environ if self._environment is None else self._environment
        visible = {"CUDA_VISIBLE_DEVICES": device} if device else {}
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(trial),
                cwd=self._root,
                env={**environment, **visible},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the driver alone, which cancels
            )
        self._running[trial.key] = _Started(trial, process, log, device)

    def command(self, trial: Trial) -> list[str]:
        """Return the command that runs a trial."""
        return [sys.executable, "-m", "runkey", *trial.arguments]

    def poll(self) -> list[Ended]:
        """See `Executor`."""
        ended = []
        for key, one in list(self._running.items()):
            code = one.process.poll()
            if code is not None:
                del self._running[key]
                # Killed by a signal of another program: most likely memory ran out.
                ended.append(Ended(key, TRY_ELSEWHERE if code < 0 else code, last_line_of(one.log)))
        return ended

    def cancel(self, key: str) -> None:
        """See `Executor`."""
        if one := self._running.get(key):
            one.process.terminate()

    def close(self) -> None:
        """See `Executor`."""
        for key in self._running:
            self.cancel(key)
        for one in self._running.values():
            try:
                one.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
        self._running.clear()


def last_line(printed: str) -> str:
    """Return the last error among what a trial printed, else its last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def last_line_of(log: Path) -> str:
    """Return the same of a log's end; "" if there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _MOST_SAID))
            return last_line(file.read().decode("utf-8", "replace"))
    except FileNotFoundError:
        return ""
