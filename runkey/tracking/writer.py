"""The calls that write one MLflow run; each may be repeated after a failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runkey.identity.record import LoggedRun
from runkey.tracking.backlog import Backlog
from runkey.tracking.describe import RunDescription
from runkey.tracking.records import logged_run
from runkey.tracking.store import Store, experiment_id, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits on one request and on one value.
_BATCH_METRICS = 1000
_BATCH_PARAMS = 100
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
        done()

    def create(self, experiment: str, description: RunDescription) -> str:
        """Make the run; its id."""
        number = experiment_id(self._client, self._store, experiment)
        tags = {name: value[:_TAG_CHARACTERS] for name, value in description.tags.items()}
        run = self._client.create_run(
            number, run_name=description.name, tags=tags, start_time=description.started_ms
        )
        self._done()
        return str(run.info.run_id)

    def describe(self, run_id: str, description: RunDescription) -> None:
        """Write the parameters and the data set."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        params = [
            Param(_legal(name), value[:_VALUE_CHARACTERS])
            for name, value in description.params.items()
        ]
        for start in range(0, len(params), _BATCH_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _BATCH_PARAMS])
        if description.dataset:
            data = description.dataset
            entity = Dataset(data.name, data.digest, "local", data.source, None, data.profile)
            context = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(run_id, [DatasetInput(entity, [context])])
        self._done()

    def write(self, run_id: str, backlog: Backlog, say: Callable[[str], None]) -> None:
        """Write all that waits: values, tags, artifacts."""
        self._metrics(run_id, backlog)
        self._tags(run_id, backlog.tags(), backlog)
        self._artifacts(run_id, backlog, say)

    def end(self, run_id: str, status: Status) -> None:
        """Set the run's status and the time of its end."""
        self._client.set_terminated(run_id, status)
        self._done()

    def end_dead(self, run_id: str) -> LoggedRun | None:
        """Mark a run KILLED whose process is gone; None if it had ended or is deleted."""
        from mlflow.exceptions import MlflowException

        try:
            if self.read(run_id).status != "RUNNING":
                return None
            self.end(run_id, "KILLED")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return self.read(run_id)

    def read(self, run_id: str) -> LoggedRun:
        """The run as the store has it now."""
        return logged_run(self._client.get_run(run_id))

    def _metrics(self, run_id: str, backlog: Backlog) -> None:
        from mlflow.entities import Metric

        while batch := backlog.metrics(_BATCH_METRICS):
            metrics = [Metric(_legal(m.name), m.value, m.time_ms, m.step) for m in batch]
            # Sent again after a lost answer, the same values are one entry in MLflow.
            self._client.log_batch(run_id, metrics=metrics)
            backlog.metrics_done(len(batch))
            self._done()

    def _tags(self, run_id: str, tags: Mapping[str, str], backlog: Backlog) -> None:
        for name, value in tags.items():
            self._client.set_tag(run_id, _legal(name), value[:_TAG_CHARACTERS])
            backlog.tag_done(name, value)
            self._done()

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


def _legal(name: str) -> str:
    """`name` with what MLflow refuses in names (brackets of a class name, say) replaced by _."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]
