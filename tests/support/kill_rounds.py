"""Real trainings that are killed again and again, and what became of them.

The stage runs as `dvc repro` runs it, in a small prepared project with a real MLflow store.  Each
training gets a store of its own; a thread watches its folder, to kill it while a checkpoint is
being written, and to keep the last checkpoint, which the stage removes when the run is recorded.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from runkey.training.checkpoint import TEMPORARY, find_checkpoints
from tests.support.kill_project import set_workers
from tests.support.project import Project, clean_environment

Kind = Literal["writing", "moment", "start", "end", "term", "worker", "none"]
"""When a training is ended: while a checkpoint is written, some time after it has begun to train,
while it starts, after its last step; by SIGTERM some time after it has begun; by SIGKILL to one of
its loader processes; not at all."""

_LONGEST_SECONDS = 600.0  # for one life of a trainer


class Watcher:
    """Looks at a training's folder a thousand times a second."""

    def __init__(self, home: Path, keep: Path) -> None:
        """Args: home: `Store.home`.  keep: gets a link to each newest checkpoint."""
        self._home, self._keep = home, keep
        self.newest = -1
        """Step of the newest checkpoint; -1: there is none."""
        self.written = 0
        """Checkpoints since the watcher began."""
        self.is_writing = False
        self._see()
        self.written = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self._see()

    def _see(self) -> None:
        for folder in self._home.glob("rk2-*"):
            with contextlib.suppress(FileNotFoundError):  # it is removed at the end
                self._look(folder)

    def _look(self, folder: Path) -> None:
        names = [path.name for path in folder.iterdir()]
        self.is_writing = any(name.endswith(TEMPORARY) for name in names)
        saved = find_checkpoints(folder)
        if saved:
            self.newest = max(self.newest, saved[0].step)
            kept, path = self._keep / saved[0].name, folder / saved[0].name
            if not kept.exists() or not kept.samefile(path):
                kept.unlink(missing_ok=True)
                os.link(path, kept)
                self.written += 1


@dataclass
class Life:
    """One process of a training, from its start to its end."""

    kind: Kind
    workers: int
    code: int
    """Its exit code; below 0: the signal that ended it."""
    was_writing: bool
    """Whether it left a checkpoint half written."""
    output: str

    @property
    def was_ended(self) -> bool:
        """Whether it was killed or stopped, and did not come to its end before."""
        return self.code != 0


@dataclass
class Training:
    """One training in a store of its own, with as many processes as it takes."""

    project: Project
    store: Path
    total: int
    """Its steps."""
    lives: list[Life] = field(default_factory=list)

    @property
    def final(self) -> Path:
        """Its last checkpoint."""
        return self.store / "kept" / f"step-{self.total:08d}.ckpt"

    @property
    def is_done(self) -> bool:
        """Whether the stage has come to its end."""
        return bool(self.lives) and not self.lives[-1].was_ended

    def live(self, kind: Kind, workers: int, rng: random.Random) -> Life:
        """Start the stage; end it as `kind` says."""
        set_workers(self.project.root, workers)
        (self.store / "kept").mkdir(parents=True, exist_ok=True)
        watcher = Watcher(self.store / ".runkey", self.store / "kept")
        address = f"sqlite:///{self.store / 'mlflow.db'}"
        with (self.store / "output.txt").open("w+") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "stages.train"],
                cwd=self.project.root,
                env=clean_environment() | {"MLFLOW_TRACKING_URI": address},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with contextlib.suppress(_EndedError):
                _end(process, kind, watcher, self.total, rng)
            code = process.wait(_LONGEST_SECONDS)
            watcher.close()
            output.seek(0)
            life = Life(kind, workers, code, self._is_torn(), output.read())
        self.lives.append(life)
        return life

    def _is_torn(self) -> bool:
        return any(self.store.glob(f".runkey/rk2-*/*{TEMPORARY}"))


class _EndedError(Exception):
    """The process has ended before its time."""


def _end(
    process: subprocess.Popen[bytes], kind: Kind, watcher: Watcher, total: int, rng: random.Random
) -> None:
    """Wait for the moment, then end the process."""
    after = 1 + rng.randrange(4)
    match kind:
        case "none":
            return
        case "start":
            _sleep(process, rng.uniform(0, 8))
        case "end":
            _until(process, lambda: watcher.written > 0 and watcher.newest >= total)
        case _:
            _until(process, lambda: watcher.written >= after)
    match kind:
        case "writing":
            _until(process, lambda: watcher.is_writing)
            _sleep(process, rng.uniform(0, 0.005))
        case "moment" | "term":
            _sleep(process, rng.uniform(0, 1.5))
        case "end":
            _sleep(process, rng.uniform(0, 5))
    if kind == "worker":
        _kill_worker(process)
    elif kind != "term":
        os.kill(process.pid, signal.SIGKILL)
    elif rng.random() < 0.5:
        os.kill(process.pid, signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)  # as a machine that shuts down does, workers too


def _kill_worker(trainer: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a loader process, as from a kernel that is out of memory."""

    def workers() -> list[psutil.Process]:
        # They are children of the fork server, which is a child of the trainer.
        with contextlib.suppress(psutil.NoSuchProcess):
            servers = psutil.Process(trainer.pid).children()
            return [worker for server in servers for worker in server.children()]
        return []

    _until(trainer, workers)
    workers()[-1].kill()


def _until(process: subprocess.Popen[bytes], condition: Any) -> None:
    end = time.monotonic() + _LONGEST_SECONDS
    while not condition():
        if process.poll() is not None:
            raise _EndedError
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError("the training does not get on")
        time.sleep(0.0005)


def _sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        raise _EndedError


def plan(kills: int, terms: int, worker_kills: int, rng: random.Random) -> Iterator[Kind]:
    """The ends to come, mixed: a third of the kills while a checkpoint is written."""
    writing = -(-kills // 3)
    others: list[Kind] = ["moment", "moment", "moment", "start", "end"]
    kinds: list[Kind] = ["writing"] * writing + ["term"] * terms + ["worker"] * worker_kills
    kinds += [others[n % len(others)] for n in range(kills - writing)]
    rng.shuffle(kinds)
    return iter(kinds)


def kill_again_and_again(
    project: Project,
    stores: Path,
    total: int,
    *,
    kills: int,
    terms: int,
    worker_kills: int,
    workers: tuple[int, ...],
    rng: random.Random,
    most_per_training: int = 25,
) -> Iterator[Training]:
    """Trainings to their ends, until so many processes were killed and stopped.

    Args:
        project: prepared.
        stores: folder of the stores, one for each training.
        total: steps of the training.
        kills: by SIGKILL.
        terms: by SIGTERM.
        worker_kills: of a loader process, which ends the training too.
        workers: numbers of loader processes, in turn.
        rng: decides when.
        most_per_training: ends of one training.
    """
    left, turn = list(plan(kills, terms, worker_kills, rng)), 0
    while left:
        training = Training(project, stores / f"store-{turn}", total)
        while not training.is_done:
            kind: Kind = left.pop() if left and len(training.lives) < most_per_training else "none"
            count = workers[(turn + len(training.lives)) % len(workers)]
            life = training.live(kind, max(count, int(kind == "worker")), rng)
            if kind == "none" and life.was_ended:
                raise RuntimeError(f"a training that nobody killed failed: {life.output}")
            missed = kind != "none" and not life.was_ended
            if missed or (kind == "writing" and not life.was_writing):
                left.insert(0, kind)  # it came too late: once more, another time
        yield training
        turn += 1
