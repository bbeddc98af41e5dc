"""Brings one MLflow run up to date with what is known here; repeated until it succeeds.

Every step may fail and is then tried again from where it was.  Nothing is written twice: a run is
found again by its pointer, and a value that MLflow has already, to the millisecond, stays one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runkey.identity.pointer import RunPointer, read_pointer, write_pointer
from runkey.identity.record import RESUMED, LoggedRun
from runkey.tracking.backlog import Backlog
from runkey.tracking.describe import RunDescription
from runkey.tracking.store import Store
from runkey.tracking.tail import LogTail
from runkey.tracking.writer import RunWriter, Status


@dataclass(frozen=True, slots=True)
class Training:
    """A training whose run this is: new, or gone on with."""

    experiment: str
    """Name of the MLflow experiment."""
    description: RunDescription
    folder: Path | None = None
    """See `paths.training_folder`; where the run is remembered.  None: nowhere."""
    logs: tuple[Path, ...] = ()
    """The logs whose values and events the run gets."""
    supersedes: tuple[str, ...] = ()
    """MLflow runs whose processes are dead; marked KILLED."""


class RunSync:
    """One run.  `update` and `end` are called by one thread, all else by any."""

    def __init__(
        self,
        store: Store,
        target: Training | str,
        backlog: Backlog,
        *,
        say: Callable[[str], None],
        changed: Callable[[LoggedRun], None],
        done: Callable[[], None] = lambda: None,
        ask: bool = False,
    ) -> None:
        """Nothing is opened yet.

        Args:
            store: where to.
            target: a training, or the id of a run to add to, whose status is left alone.
            backlog: what waits in memory.
            say: told what people should know, in one line each.
            changed: told what MLflow has of a run when it begins, was interrupted, or ends.
            done: called after every call that succeeded.
            ask: nothing is trained now; send only what the run lacks, whatever was sent before.
        """
        self._store = store
        self._training = target if isinstance(target, Training) else None
        self.run_id = target if isinstance(target, str) else None
        self._backlog = backlog
        self._say, self._changed, self._done, self._ask = say, changed, done, ask
        self._writer: RunWriter | None = None
        self._tails: dict[str, LogTail] = {}
        self._pointer: RunPointer | None = None
        self._superseded = list(self._training.supersedes) if self._training else []
        self._opened = self._training is None
        self._unwritable = False
        self.made = threading.Event()
        """Set when there is a run."""
        self.started_ms = 0
        """When the training began, in milliseconds since 1970; known when there is a run."""
        self.ended = False
        self.sent = 0
        """Values of the log that were sent."""

    def update(self) -> None:
        """Connection, run, description, values, tags, artifacts; whatever MLflow raises comes."""
        if self._writer is None:
            self._writer = RunWriter(self._store, self._done)
        if self._training and not self._opened:
            self._open(self._writer, self._training)
        self.made.set()
        assert self.run_id
        while self._superseded:
            dead = self._writer.end_dead(self._superseded[-1])
            if dead:
                self._changed(dead)
            self._superseded.pop()
        for name, tail in self._tails.items():
            self._send_log(self._writer, name, tail, self.run_id)
        self._writer.write(self.run_id, self._backlog, self._say)

    def end(self, status: Status, ended_ms: int | None = None) -> None:
        """Set the status of a training's run, and tell what MLflow has of it."""
        assert self._writer
        assert self.run_id
        if self._training:
            self._writer.end(self.run_id, status, ended_ms)
        self._changed(self._writer.read(self.run_id))
        self.ended = True

    def missing(self) -> str:
        """What MLflow lacks, for people; empty if nothing."""
        tails = self._tails or self._open_tails({})
        return self._backlog.missing(sum(tail.left() for tail in tails.values()))

    def _open(self, writer: RunWriter, training: Training) -> None:
        """Find the training's run or make it, and begin to read its log."""
        pointer = self._pointer or (read_pointer(training.folder) if training.folder else None)
        run = self._find(writer, training, pointer) if pointer else None
        if run is None:
            run = self._make(writer, training)
        self.run_id = run.run_id
        self.started_ms = run.started_ms
        self._changed(run)
        assert self._pointer
        self._tails = self._open_tails({} if self._ask else self._pointer.sent)
        self._opened = True

    def _open_tails(self, sent: Mapping[str, int]) -> dict[str, LogTail]:
        logs = self._training.logs if self._training else ()
        return {log.name: LogTail(log, sent.get(log.name, 0)) for log in logs}

    def _find(self, writer: RunWriter, training: Training, pointer: RunPointer) -> LoggedRun | None:
        """The run that a pointer names, going on; None: there is none any more, or none yet."""
        run_id = pointer.run_id or writer.find(training.experiment, pointer.token)
        if run_id is None:
            return None
        run = writer.reopen(run_id, training.description, running=not self._ask)
        if run is None:
            made = f", where it was made: {pointer.uri}" if pointer.uri != self._store.uri else ""
            self._say(
                f"MLflow: run {run_id[:8]} of this training is not in {self._store.uri}{made}; it"
                " is recorded as a new run"
            )
            return None
        self._point(replace(pointer, uri=self._store.uri, run_id=run_id))
        return run

    def _make(self, writer: RunWriter, training: Training) -> LoggedRun:
        """Make the run; its token is written down before, its id after."""
        pointer = RunPointer(self._store.uri)
        self._point(pointer)
        run_id = writer.create(training.experiment, training.description, pointer.token)
        self._point(replace(pointer, run_id=run_id))
        # There is a run from here on, whatever fails next: people are told its name.
        self.run_id, self.started_ms = run_id, training.description.started_ms
        writer.describe(run_id, training.description)
        return writer.read(run_id)

    def _send_log(self, writer: RunWriter, name: str, tail: LogTail, run_id: str) -> None:
        interrupted = False
        while piece := tail.next():
            points = writer.missing(run_id, piece.points) if self._ask else piece.points
            writer.metrics(run_id, points)
            writer.tag(run_id, piece.tags)
            self.sent += len(points)
            interrupted |= RESUMED in piece.tags
            tail.done(piece)
            assert self._pointer
            self._point(replace(self._pointer, sent={**self._pointer.sent, name: piece.end}))
        if interrupted:
            self._changed(writer.read(run_id))

    def _point(self, pointer: RunPointer) -> None:
        """Remember the run; the folder, too, if it can be written."""
        self._pointer = pointer
        if self._training is None or self._training.folder is None or self._unwritable:
            return
        try:
            write_pointer(self._training.folder, pointer)
        except OSError as error:
            self._unwritable = True
            self._say(
                f"{self._training.folder}: cannot be written ({error.strerror}); if training is"
                " interrupted now, it may go on in another MLflow run"
            )
