"""Brings one MLflow run up to date with what is known here; repeated until it succeeds.

Every step may fail and is then tried again from where it was.  Nothing is written twice: a run is
found again by its pointer, and a value that MLflow has already, to the millisecond, stays one.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import batched, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runkey.identity.record import (
    RESUMED,
    RESUMED_AFTER,
    TOKEN,
    LoggedRun,
    RunPointer,
    read_pointer,
    write_pointer,
)
from runkey.tracking.describe import RunDescription
from runkey.tracking.log import ALWAYS_NEW, Entry, parse_line, time_ms
from runkey.tracking.store import Store, experiment_id, open_client
from runkey.tracking.transfer import logged_run

if TYPE_CHECKING:
    from mlflow import MlflowClient


# What waits in memory to be written to MLflow.  Filled by training, emptied by the writing thread.


_MOST_METRICS = 200_000
"""Nothing that is logged here comes so often; if it does while MLflow is away, the oldest go."""


class MetricPoint(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    time_ms: int
    """Milliseconds since 1970."""
    step: int


class Backlog:
    """Values, tags and artifacts in order.  An item leaves only when it has been written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: deque[MetricPoint] = deque()
        self._first = 0
        self._dropped = 0
        self._tags: dict[str, str] = {}
        self._artifacts: deque[tuple[Path, str]] = deque()

    def add_metrics(self, values: Mapping[str, float], step: int, time_ms: int) -> int:
        """Append one step's values.  Returns how many values wait now."""
        points = [MetricPoint(name, float(v), time_ms, step) for name, v in values.items()]
        with self._lock:
            self._metrics.extend(points)
            while len(self._metrics) > _MOST_METRICS:
                self._pop()
                self._dropped += 1
            return len(self._metrics)

    def metrics(self, most: int) -> tuple[list[MetricPoint], int]:
        """The oldest values, at most that many, and the number to give to `metrics_done`."""
        with self._lock:
            points = list(islice(self._metrics, most))
            return points, self._first + len(points)

    def metrics_done(self, end: int) -> None:
        """Drop the values that `metrics` gave with this number."""
        with self._lock:
            while self._first < end:
                self._pop()

    def add_tag(self, name: str, value: str) -> None:
        """Set a tag, over an earlier value."""
        with self._lock:
            self._tags[name] = value

    def tags(self) -> dict[str, str]:
        """The tags that wait."""
        with self._lock:
            return dict(self._tags)

    def tags_done(self, written: Mapping[str, str]) -> None:
        """Drop tags, unless they were set to something else meanwhile."""
        with self._lock:
            for name, value in written.items():
                if self._tags.get(name) == value:
                    del self._tags[name]

    def add_artifact(self, path: Path, folder: str) -> None:
        """Append a file or folder."""
        with self._lock:
            self._artifacts.append((path, folder))

    def artifact(self) -> tuple[Path, str] | None:
        """The oldest artifact, or None; it stays until `artifact_done`."""
        with self._lock:
            return self._artifacts[0] if self._artifacts else None

    def artifact_done(self) -> None:
        """Drop the oldest artifact."""
        with self._lock:
            self._artifacts.popleft()

    def missing(self, values_elsewhere: int = 0) -> str:
        """What still waits, for people (`12 values and 2 artifacts`); empty if nothing does.

        Args:
            values_elsewhere: values that wait in the log.
        """
        with self._lock:
            return counted(
                (len(self._metrics) + self._dropped + values_elsewhere, "value"),
                (len(self._tags), "tag"),
                (len(self._artifacts), "artifact"),
            )

    def _pop(self) -> None:
        self._metrics.popleft()
        self._first += 1


def counted(*counts: tuple[int, str]) -> str:
    """`12 values and 2 artifacts`; what there is none of is left out."""
    return " and ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts if n)


# The log as MLflow is to have it: what was written to the file, read from there and sent on.


_VALUES = 1000
"""In one piece: as many as MLflow takes at once."""
_MOST_TOLD = 100
_STEPS = 64
"""The last ones, whose metrics are remembered."""


@dataclass(slots=True)
class Piece:
    """Some lines on end, and what the tail knows behind them."""

    end: int
    """Byte behind them."""
    names: dict[int, frozenset[str]]
    """Metrics of the last steps."""
    resumed: tuple[str, ...]
    """The interruptions so far."""
    points: list[MetricPoint] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


def points_of(entry: Entry) -> list[MetricPoint]:
    """The values of a line of the log, as MLflow gets them."""
    time_stamp = time_ms(entry)
    return [
        MetricPoint(name, float(value), time_stamp, entry["step"])
        for name, value in entry["values"].items()
    ]


class LogTail:
    """Reads a log from where MLflow has it up to the end.

    Of a metric that a step has in two lines, its own and that of the epoch which it ends, MLflow
    gets the first: one value a step.
    """

    def __init__(self, path: Path, offset: int) -> None:
        """Nothing is read yet.

        Args:
            path: the log; it may not be there yet.
            offset: MLflow has the lines before this byte.
        """
        self._path = path
        size = path.stat().st_size if path.is_file() else 0
        # Shorter than what was sent: it was lost, and whatever is there now may be something else.
        self.offset = offset if offset <= size else 0
        self._names: dict[int, frozenset[str]] = {}
        self._resumed: tuple[str, ...] = ()
        if self.offset:
            self._remember()

    def next(self) -> Piece | None:
        """The lines at `offset`, some thousand values; None: there are no more yet."""
        piece = Piece(self.offset, dict(self._names), self._resumed)
        for line in self._lines():
            piece.end += len(line)
            if entry := parse_line(line):
                _add(piece, entry)
            if len(piece.points) >= _VALUES:
                break
        return piece if piece.end > self.offset else None

    def done(self, piece: Piece) -> None:
        """Go on behind a piece; until then `next` gives it again."""
        self.offset, self._names, self._resumed = piece.end, piece.names, piece.resumed

    def left(self) -> int:
        """How many values are still to be sent."""
        if not self._path.is_file():
            return 0
        with self._path.open("rb") as file:
            file.seek(self.offset)
            return sum(len((parse_line(line) or {}).get("values", ())) for line in file)

    def _lines(self) -> Iterator[bytes]:
        """The whole lines from `offset` on that are on the disk."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            left = os.fstat(file.fileno()).st_size - self.offset
            file.seek(self.offset)
            for line in file:
                left -= len(line)
                if left < 0 or not line.endswith(b"\n"):
                    return
                yield line

    def _remember(self) -> None:
        """Note what `done` would have left: interruptions, and the metrics of the last steps."""
        piece = Piece(self.offset, {}, ())
        last: deque[bytes] = deque(maxlen=2 * _STEPS)
        with self._path.open("rb") as file:
            position = 0
            for line in file:
                position += len(line)
                if position > self.offset:
                    break
                if b'"resumed"' in line:
                    _add(piece, parse_line(line) or {})
                last.append(line)
        for entry in filter(None, map(parse_line, last)):
            if "values" in entry:
                _add(piece, entry)
        self._names, self._resumed = piece.names, piece.resumed


def _add(piece: Piece, entry: Entry) -> None:
    """Add a line to a piece."""
    if "event" in entry:
        piece.tags[f"event.{entry['event']}"] = json.dumps(entry["fields"])
        if entry["event"] in ALWAYS_NEW:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
            piece.resumed += (f"step {entry['fields'].get('step')} at {when}",)
            piece.tags[RESUMED] = str(len(piece.resumed))
            piece.tags[RESUMED_AFTER] = "; ".join(piece.resumed[-_MOST_TOLD:])
    elif "values" in entry:
        step = entry["step"]
        before = piece.names.pop(step, frozenset())
        piece.names[step] = before | entry["values"].keys()
        if len(piece.names) > _STEPS:
            del piece.names[next(iter(piece.names))]
        piece.points += [point for point in points_of(entry) if point.name not in before]


# The calls that write one MLflow run; each may be repeated after a failure.


Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits on one request and on one value.
_BATCH_METRICS = 1000
_BATCH_PARAMS = 100
_BATCH_TAGS = 100
_VALUE_CHARACTERS = 6000
_TAG_CHARACTERS = 5000


class RunWriter:
    """Writes to a store through MLflow's client; whatever MLflow raises comes through."""

    def __init__(self, store: Store, done: Callable[[], None]) -> None:
        """Opens the store: imports mlflow (5 s) and makes the database (3 s) if need be.

        Args:
            store: where to.
            done: called after every call that succeeded.
        """
        self._store = store
        self._client: MlflowClient = open_client(store)
        self._done = done
        self._has: dict[str, set[bytes]] = {}
        done()

    def create(self, experiment: str, description: RunDescription, token: str) -> str:
        """Make the run; its id.  `token` is kept with it, for `find`."""
        number = experiment_id(self._client, self._store, experiment)
        tags = {name: value[:_TAG_CHARACTERS] for name, value in description.tags.items()}
        run = self._client.create_run(
            number,
            run_name=description.name,
            tags=tags | {TOKEN: token},
            start_time=description.started_ms,
        )
        self._done()
        return str(run.info.run_id)

    def find(self, experiment: str, token: str) -> str | None:
        """The id of the run that was made with a token; None if there is none."""
        number = experiment_id(self._client, self._store, experiment)
        found = self._client.search_runs([number], f"tags.{TOKEN} = '{token}'", max_results=1)
        self._done()
        return str(found[0].info.run_id) if found else None

    def reopen(
        self, run_id: str, description: RunDescription, *, running: bool
    ) -> LoggedRun | None:
        """Bring the description of a run up to date; None if it is gone or in the trash.

        Parameters and data set are written only if a process died before it had done so.

        Args:
            run_id: the run.
            description: how it goes on; its tags may have changed, with the machine.
            running: say that it runs again.
        """
        run = self._run(run_id)
        if run is None:
            return None
        if running and run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        changed = {
            n: v for n, v in description.tags.items() if run.data.tags.get(legal_name(n)) != v
        }
        self.tag(run_id, changed)
        if any(legal_name(name) not in run.data.params for name in description.params):
            self.describe(run_id, description)
        return self.read(run_id)

    def describe(self, run_id: str, description: RunDescription) -> None:
        """Write the data set and the parameters."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        if description.dataset:
            data = description.dataset
            entity = Dataset(data.name, data.digest, "local", data.source, None, data.profile)
            context = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(run_id, [DatasetInput(entity, [context])])
        for some in batched(description.params.items(), _BATCH_PARAMS):
            params = [Param(legal_name(name), value[:_VALUE_CHARACTERS]) for name, value in some]
            self._client.log_batch(run_id, params=params)
        self._done()

    def metrics(self, run_id: str, points: Iterable[MetricPoint]) -> None:
        """Write values; those that the run has already, to the millisecond, stay one entry."""
        from mlflow.entities import Metric

        for some in batched(points, _BATCH_METRICS):
            metrics = [Metric(legal_name(m.name), m.value, m.time_ms, m.step) for m in some]
            self._client.log_batch(run_id, metrics=metrics)
            self._done()

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, over earlier values."""
        from mlflow.entities import RunTag

        for some in batched(tags.items(), _BATCH_TAGS):
            entities = [RunTag(legal_name(name), value[:_TAG_CHARACTERS]) for name, value in some]
            self._client.log_batch(run_id, tags=entities)
            self._done()

    def write(self, run_id: str, backlog: Backlog, say: Callable[[str], None]) -> None:
        """Write all that waits in memory: values, tags, artifacts."""
        while True:
            points, end = backlog.metrics(_BATCH_METRICS)
            if not points:
                break
            self.metrics(run_id, points)
            backlog.metrics_done(end)
        tags = backlog.tags()
        self.tag(run_id, tags)
        backlog.tags_done(tags)
        self._artifacts(run_id, backlog, say)

    def end(self, run_id: str, status: Status, ended_ms: int | None = None) -> None:
        """Set the run's status and the time of its end (None: now)."""
        self._client.set_terminated(run_id, status, ended_ms)
        self._done()

    def end_dead(self, run_id: str) -> LoggedRun | None:
        """Mark a run KILLED whose process is gone; None if it had ended or is deleted."""
        run = self._run(run_id)
        if run is None or run.info.status != "RUNNING":
            return None
        self.end(run_id, "KILLED")
        return self.read(run_id)

    def read(self, run_id: str) -> LoggedRun:
        """The run as the store has it now."""
        return logged_run(self._client.get_run(run_id))

    def missing(self, run_id: str, points: Iterable[MetricPoint]) -> list[MetricPoint]:
        """Those of some values that the run did not have when its metric was first asked about."""
        lacking = []
        for point in points:
            name = legal_name(point.name)
            if name not in self._has:
                history = self._client.get_metric_history(run_id, name)
                self._has[name] = {_packed(m.value, m.timestamp, m.step) for m in history}
                self._done()
            if _packed(point.value, point.time_ms, point.step) not in self._has[name]:
                lacking.append(point)
        return lacking

    def _run(self, run_id: str) -> Any:
        """The run (`mlflow.entities.Run`); None if the store does not have it, or in its trash."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _artifacts(self, run_id: str, backlog: Backlog, say: Callable[[str], None]) -> None:
        while item := backlog.artifact():
            path, folder = item
            if not path.exists():
                say(f"MLflow: {path} is not there and was not kept with the run")
            else:
                self._artifact(run_id, path, folder or None)
            backlog.artifact_done()
            self._done()

    def _artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), folder)
        else:
            self._client.log_artifact(run_id, str(path), folder)


def _packed(value: float, time_ms: int, step: int) -> bytes:
    """What makes two points of a metric one entry in MLflow, which has the largest float for inf.

    Packed, for a long training has a million of them.
    """
    if math.isinf(value):
        value = math.copysign(sys.float_info.max, value)
    return struct.pack("<dqq", math.nan if math.isnan(value) else value, time_ms, step)


def legal_name(name: str) -> str:
    """`name` with what MLflow refuses in names (brackets of a class name, say) replaced by _."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


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
