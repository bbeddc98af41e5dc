"""Send one run to MLflow: follow its logs and write what MLflow does not have yet.

Any call may fail; the next `RunSender.update` continues where the last one stopped. A pointer file
in the training's folder names the run and how many bytes of each log it has; a value that arrives
again with the same time is one entry in MLflow.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runkey.identity.record import HINT, RESUMED, RESUMED_AFTER, TOKEN, LoggedRun, RunPointer
from runkey.paths import Address
from runkey.tracking.describe import RunDescription, is_edited
from runkey.tracking.log import ALWAYS_NEW, Entry, read_log
from runkey.tracking.store import MAX_METRICS, NOTE, Store, experiment_id, open_client
from runkey.tracking.transfer import logged_run
from runkey.units import counted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_VALUE_CHARACTERS = 6000
_TAG_CHARACTERS = 5000
"""MLflow's limits on one parameter and one tag."""
_MAX_RESUMES_LISTED = 100
_STEPS_REMEMBERED = 64


def metrics_of(entry: Entry) -> list[Metric]:
    """Return the values of a log entry as MLflow gets them."""
    from mlflow.entities import Metric

    time_ms = round(float(entry["time"]) * 1000)
    return [
        Metric(legal_name(name), float(value), time_ms, entry["step"])
        for name, value in entry["values"].items()
    ]


def legal_name(name: str) -> str:
    """Replace what MLflow refuses in names (such as brackets of a class name) by underscores."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def event_text(kind: str, fields: Mapping[str, Any]) -> str:
    """Write an event for people: a hint as a sentence, others as `step 40, epoch 3`."""
    if f"event.{kind}".startswith(HINT):
        return f"{fields.get('seen')}; {fields.get('change')}"
    return ", ".join(f"{name} {_plain(value)}" for name, value in fields.items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(slots=True)
class LogTail:
    """A log up to `offset`: what its last lines hold, and what is to be known of all before.

    A step that ends an epoch has two lines, which may share metrics. MLflow gets the first value.
    """

    path: Path
    offset: int = 0
    """In bytes; all of them whole lines."""
    metrics: list[Metric] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    names: dict[int, frozenset[str]] = field(default_factory=dict)
    """Metrics of each of the last steps."""
    resumed: tuple[str, ...] = ()
    """Where and when training was resumed so far."""

    def ahead(self, stop: int = sys.maxsize) -> LogTail | None:
        """Return the tail behind the next lines up to `stop`, about a thousand values.

        None if there are no more yet. This tail stays as it is.
        """
        tail = LogTail(self.path, self.offset, names=dict(self.names), resumed=self.resumed)
        for end, entry in read_log(self.path, self.offset, stop):
            tail.offset = end
            tail._add(entry)
            if len(tail.metrics) >= MAX_METRICS:
                break
        return tail if tail.offset > self.offset else None

    def count_left(self) -> int:
        """Count the values behind `offset`."""
        return sum(len(e.get("values", ())) for _, e in read_log(self.path, self.offset))

    def _add(self, entry: Entry) -> None:
        """Add a line; of a metric that the step has already, nothing."""
        if "event" in entry:
            kind, fields = entry["event"], entry["fields"]
            self.tags[f"event.{kind}"] = event_text(kind, fields)
            if kind in ALWAYS_NEW:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
                self.resumed += (f"step {fields.get('step')} at {when}",)
                self.tags[RESUMED] = str(len(self.resumed))
                self.tags[RESUMED_AFTER] = "; ".join(self.resumed[-_MAX_RESUMES_LISTED:])
        else:
            step = entry["step"]
            before = self.names.pop(step, frozenset())
            self.names[step] = before | entry["values"].keys()
            if len(self.names) > _STEPS_REMEMBERED:
                del self.names[next(iter(self.names))]
            values = {n: v for n, v in entry["values"].items() if n not in before}
            self.metrics += metrics_of(entry | {"values": values})


def open_tail(path: Path, offset: int) -> LogTail:
    """Return the tail of a log whose first `offset` bytes MLflow has."""
    tail = LogTail(path)
    # A log shorter than what was sent was lost, and what is there now is another one.
    if path.is_file() and offset <= path.stat().st_size:
        while tail.offset < offset and (ahead := tail.ahead(offset)):
            tail = ahead
    return tail


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training to record, new or resumed."""

    experiment: str
    """Name of the MLflow experiment."""
    description: RunDescription
    folder: Path
    """See `runkey.identity.key.training_folder`; holds the pointer to the MLflow run."""
    logs: tuple[Path, ...] = ()
    """Logs whose values and events the run gets."""
    supersedes: tuple[str, ...] = ()
    """MLflow runs of dead processes, to be marked KILLED."""


class Outbox[T](list[T]):
    """Items for a run, in order; any thread may append while one sends."""

    sent = 0

    @property
    def left(self) -> list[T]:
        """The items that MLflow lacks."""
        return self[self.sent :]

    def send(self, send: Callable[[list[T]], None], size: int = MAX_METRICS) -> None:
        """Send what is left in batches."""
        while some := self.left[:size]:
            send(some)
            self.sent += len(some)


class RunSender:
    """Writes one MLflow run; whatever MLflow raises comes through.

    One thread calls `update` and `end`; any thread may append to `entries`, `tags` and `artifacts`,
    which hold what is in no log.
    """

    def __init__(
        self,
        store: Store,
        target: TrainingRun | str,
        *,
        on_change: Callable[[LoggedRun], None] = lambda _: None,
        resend: bool = False,
    ) -> None:
        """Prepare; the first `update` opens the store.

        Args:
            store: where the run is, or will be made.
            target: a training, or the id of a run to add to, whose status is left alone.
            on_change: called with what MLflow has of a run when it starts, is resumed, or ends.
            resend: compare the whole log with the run; the run is not marked RUNNING.
        """
        self._store = store
        self.training = target if isinstance(target, TrainingRun) else None
        self.run_id = target if isinstance(target, str) else ""
        """Empty until a training's run exists."""
        self._on_change, self._resend = on_change, resend
        logs = self.training.logs if self.training else ()
        self._tails = {log.name: LogTail(log) for log in logs}
        """How much of each log MLflow has."""
        self._pointer: RunPointer | None = None
        self._superseded = list(self.training.supersedes) if self.training else []
        self._folder = self.training.folder if self.training else None
        """For the pointer; None if it cannot be written."""
        self._stored: dict[str, set[tuple[int, int]]] = {}
        """With `resend`: step and time of the values that the run has of a metric."""
        self.entries = Outbox[Entry]()
        self.tags = Outbox[tuple[str, str]]()
        self.artifacts = Outbox[tuple[Path, str]]()
        """Each a file, or a folder whose files are copied, and the folder that it goes to."""
        self.created = threading.Event()
        """Set when the run exists."""
        self.started_ms = 0
        """Known when the run exists."""
        self.last_answer = time.monotonic()
        """When a call to MLflow last succeeded."""
        self.ended = False
        self.values_sent = 0
        """Number of values sent from the logs."""

    def update(self) -> None:
        """Send everything: description, values, tags, artifacts; open or make the run first."""
        if self.training and not self.created.is_set():
            self._open(self.training)
        self.created.set()
        while self._superseded:
            run = self._active_run(self._superseded[-1])
            if run and run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")
                self._report(run.info.run_id)
            self._superseded.pop()
        for name in self._tails:
            self._send_log(name)
        for entry in self.entries.left:
            if entry["step"] is None:
                self._give_step(entry)
        self.entries.send(lambda entries: self._log([m for e in entries for m in metrics_of(e)]))
        self.tags.send(self._log_tags)
        self.artifacts.send(self._log_artifacts, 1)

    def end(self, status: Status, ended_ms: int | None = None) -> None:
        """Set a training's status and end time (None: now), and report the run's final state."""
        if self.training:
            self._client.set_terminated(self.run_id, status, ended_ms)
        self._report(self.run_id)
        self.ended = True

    def missing(self) -> str:
        """Return what MLflow lacks, such as `12 values and 2 artifacts`; empty if nothing."""
        values = sum(len(entry["values"]) for entry in self.entries.left)
        counts = {
            "value": values + sum(tail.count_left() for tail in self._tails.values()),
            "tag": len(dict(self.tags.left)),
            "artifact": len(self.artifacts.left),
        }
        return " and ".join(counted(n, noun) for noun, n in counts.items() if n)

    @cached_property
    def _client(self) -> MlflowClient:
        client = open_client(self._store)
        self.last_answer = time.monotonic()
        return client

    def _open(self, training: TrainingRun) -> None:
        """Find the training's run or make it, and move its logs behind what was sent."""
        pointer = self._pointer or RunPointer.read(training.folder)
        run = (pointer and self._find(training, pointer)) or self._create(training)
        # Set first: if the next call fails, users still see the name of the run.
        self.run_id, self.started_ms = str(run.info.run_id), run.info.start_time
        self._describe(run, training.description)
        self._report(self.run_id)
        if self._pointer and not self._resend:
            sent = self._pointer.sent
            self._tails = {log.name: open_tail(log, sent.get(log.name, 0)) for log in training.logs}

    def _find(self, training: TrainingRun, pointer: RunPointer) -> Any:
        """Return the `Run` that a pointer names; None if it is gone or was never made."""
        run_id = pointer.run_id
        if run_id is None:
            where = experiment_id(self._client, self._store, training.experiment)
            token = f"tags.{TOKEN} = '{pointer.token}'"
            found = self._client.search_runs([where], token, max_results=1)
            if not found:
                return None
            run_id = str(found[0].info.run_id)
        run = self._active_run(run_id)
        if run is None:
            there = Address(pointer.uri)  # runkey 1.0 wrote it with its login
            made = f", where it was made: {there}" if there != self._store.uri else ""
            logger.warning(
                f"MLflow: run {run_id[:8]} of this training is not in {self._store.uri}{made}; it"
                " is recorded as a new run"
            )
            return None
        if not self._resend and run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        self._point(replace(pointer, uri=self._store.uri, run_id=run_id))
        return run

    def _create(self, training: TrainingRun) -> Any:
        """Make the `Run`. Its token is written to the folder before, its id after."""
        pointer = RunPointer(self._store.uri)
        self._point(pointer)
        description = training.description
        tags = {name: value[:_TAG_CHARACTERS] for name, value in description.tags.items()}
        run = self._client.create_run(
            experiment_id(self._client, self._store, training.experiment),
            run_name=description.name,
            tags=tags | {TOKEN: pointer.token},
            start_time=description.started_ms,
        )
        self._point(replace(pointer, run_id=str(run.info.run_id)))
        return run

    def _describe(self, run: Any, description: RunDescription) -> None:
        """Log what the `Run` lacks: all of a new one, perhaps of one whose process died early."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        params, tags = run.data.params, run.data.tags
        lacking = {n: v for n, v in description.params.items() if legal_name(n) not in params}
        changed = {n: v for n, v in description.tags.items() if tags.get(legal_name(n)) != v}
        if is_edited(tags):
            changed.pop(NOTE, None)
        if lacking and description.dataset:
            entity = Dataset(source_type="local", **description.dataset)
            context = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(run.info.run_id, [DatasetInput(entity, [context])])
        self._log(params=lacking, tags=changed)

    def _send_log(self, name: str) -> None:
        path, resumed = self._tails[name].path, False
        if not path.is_file():
            return
        with path.open("rb") as file:  # what MLflow has must not be lost here
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        while tail := self._tails[name].ahead(size):
            metrics = self._lacking(tail.metrics) if self._resend else tail.metrics
            self._log(metrics, tags=tail.tags)
            self.values_sent += len(metrics)
            resumed |= RESUMED in tail.tags
            self._tails[name] = tail
            assert self._pointer
            self._point(replace(self._pointer, sent={**self._pointer.sent, name: tail.offset}))
        if resumed:
            self._report(self.run_id)

    def _log(
        self,
        metrics: Sequence[Metric] = (),
        params: Mapping[str, str] = {},
        tags: Mapping[str, str] = {},
    ) -> None:
        from mlflow.entities import Param, RunTag

        self._client.log_batch(
            self.run_id,
            metrics=metrics,
            params=[Param(legal_name(n), text[:_VALUE_CHARACTERS]) for n, text in params.items()],
            tags=[RunTag(legal_name(n), text[:_TAG_CHARACTERS]) for n, text in tags.items()],
        )
        self.last_answer = time.monotonic()

    def _log_tags(self, tags: Iterable[tuple[str, str]]) -> None:
        """Log tags, but not a description in place of a user's own."""
        values = dict(tags)
        if NOTE in values and is_edited(self._client.get_run(self.run_id).data.tags):
            del values[NOTE]
        self._log(tags=values)

    def _log_artifacts(self, artifacts: Iterable[tuple[Path, str]]) -> None:
        for path, folder in artifacts:
            if path.exists():
                log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log(self.run_id, str(path), folder or None)
                self.last_answer = time.monotonic()
            else:
                logger.warning(f"MLflow: {path} is not there and was not kept with the run")

    def _give_step(self, entry: Entry) -> None:
        """Put values behind the last ones of their names; drop those that the run has there.

        MLflow shows the value of the last step, and both of two at the same step.
        """
        behind, values = 0, {}
        for name, value in entry["values"].items():
            history = self._client.get_metric_history(self.run_id, legal_name(name))
            last = max(history, key=lambda one: (one.step, one.timestamp), default=None)
            behind = max(behind, last.step + 1 if last else 0)
            if last is None or repr(last.value) != repr(float(value)):
                values[name] = value
        # Changed in place: an attempt that is repeated must send the very same points.
        entry |= {"step": behind, "values": values}

    def _lacking(self, metrics: Iterable[Metric]) -> list[Metric]:
        """Return the metrics that the run did not have when it was first asked for their name."""
        lacking = []
        for metric in metrics:
            if metric.key not in self._stored:
                history = self._client.get_metric_history(self.run_id, metric.key)
                self._stored[metric.key] = {(one.step, one.timestamp) for one in history}
            if (metric.step, metric.timestamp) not in self._stored[metric.key]:
                lacking.append(metric)
        return lacking

    def _active_run(self, run_id: str) -> Any:
        """Return the `mlflow.entities.Run`; None if the store lacks it or has it in its trash."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _report(self, run_id: str) -> None:
        self._on_change(logged_run(self._client.get_run(run_id)))
        self.last_answer = time.monotonic()

    def _point(self, pointer: RunPointer) -> None:
        """Keep the pointer, also in the training's folder if that can be written."""
        self._pointer = pointer
        if self._folder is None:
            return
        try:
            pointer.write(self._folder)
        except OSError as error:
            logger.warning(
                f"{self._folder}: cannot be written ({error.strerror}); if training is interrupted"
                " now, it may go on in another MLflow run"
            )
            self._folder = None
