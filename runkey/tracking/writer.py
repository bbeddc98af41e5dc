"""The calls that write one MLflow run; each may be repeated after a failure."""

from __future__ import annotations

import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runkey.identity.pointer import TOKEN
from runkey.identity.record import LoggedRun
from runkey.tracking.backlog import Backlog, MetricPoint
from runkey.tracking.describe import RunDescription
from runkey.tracking.records import logged_run
from runkey.tracking.store import Store, experiment_id, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
