"""Copies an MLflow run from one store to another, by way of a folder.

The copy is a run like any other, with an id of its own; `runkey.identity.run_folder` says what lies
in the folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from runkey import paths
from runkey.errors import TrackingError
from runkey.identity.record import DETAILS, KEY, Details, LoggedRun, Record, write_record
from runkey.identity.run_folder import ARTIFACTS, CONTENT, ORIGIN, SCHEMA
from runkey.progress import Steps, each, progress
from runkey.tracking.records import logged_run
from runkey.tracking.store import Store, experiment_id, open_client, quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's bounds on one request.
_METRICS = 1000
_PARAMS = 100
_TAGS = 100
LOOK_SECONDS = 0.3
_NOT_COPIED = ("mlflow.runName", "mlflow.artifactLocation")


@dataclass(frozen=True)
class StoreRuns:
    """The runs of a store, as `runkey.registry.team.package.Runs` wants them."""

    store: Store
    experiment: str
    """Name of the experiment that copies are put in."""

    def read(self, run_id: str, folder: Path) -> dict[str, Any]:
        """Copy a run to a folder; see `read_run`."""
        with self._errors(f"run {run_id} could not be read"):
            return read_run(self.store, run_id, folder)

    def write(self, folder: Path) -> LoggedRun:
        """Copy a run from a folder; see `write_run`.  A local store gets its record's file too."""
        with self._errors("the run could not be written"):
            run = write_run(self.store, self.experiment, folder)
        if not self.store.is_server:
            path = folder / ARTIFACTS / DETAILS
            stored = json.loads(path.read_text(encoding="utf-8"))
            details = Details.from_dict(stored, str(path))
            write_record(self.store.home / paths.RECORDS, Record(run=run, details=details))
        return run

    def add(self, run_id: str, file: Path) -> None:
        """Add a file to a run's artifacts."""
        with self._errors(f"{file.name} could not be added to run {run_id}"):
            open_client(self.store).log_artifact(run_id, str(file))

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        quiet_mlflow()
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            text = " ".join(str(error).split())
            raise TrackingError(f"{self.store.uri}: {what} ({text[:200]})") from None


def read_run(store: Store, run_id: str, folder: Path) -> dict[str, Any]:
    """Copy a run out of a store.

    Args:
        store: where it is.
        run_id: MLflow's id.
        folder: must exist; `CONTENT` and `ARTIFACTS` are made in it.

    Returns:
        What `CONTENT` holds.

    Raises:
        TrackingError: the store cannot be opened.
        MlflowException, OSError: it refuses, or the artifacts cannot be read.
    """
    client = open_client(store)
    run = client.get_run(run_id)
    inputs = run.inputs.dataset_inputs if run.inputs else []
    content = {
        "schema": SCHEMA,
        "run_id": run_id,
        "name": run.info.run_name or "",
        "status": run.info.status,
        "started_ms": run.info.start_time,
        "ended_ms": run.info.end_time,
        "params": dict(run.data.params),
        "tags": {n: v for n, v in run.data.tags.items() if n not in _NOT_COPIED},
        "metrics": {
            name: _history(client, run_id, name)
            for name in each("metrics from MLflow", sorted(run.data.metrics), "metrics")
        },
        "datasets": [_dataset(used) for used in inputs],
    }
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    (folder / CONTENT).write_text(text + "\n", encoding="utf-8")
    (folder / ARTIFACTS).mkdir()
    _read_files(client, run_id, folder / ARTIFACTS)
    return content


def write_run(store: Store, experiment: str, folder: Path) -> LoggedRun:
    """Copy a run into a store, from the folder that `read_run` filled.

    The key is written last: until then nobody who looks for it finds the copy.  What an earlier,
    interrupted copy of the same run left is deleted first.

    Args:
        store: where to.
        experiment: name of the experiment, made if need be.
        folder: as `read_run` leaves it.

    Returns:
        The copy.

    Raises:
        TrackingError: the store cannot be opened.
        MlflowException, OSError: it refuses, or cannot be reached.
    """
    content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
    origin = content["tags"].get(ORIGIN, content["run_id"])
    client = open_client(store)
    where = experiment_id(client, store, experiment)
    for half in copies(client, where, origin):
        if KEY not in half.data.tags:
            client.delete_run(half.info.run_id)
    created = client.create_run(
        where,
        run_name=content["name"],
        start_time=content["started_ms"],
        tags={ORIGIN: origin},
    )
    run_id = str(created.info.run_id)
    _write_values(client, run_id, content)
    _write_files(client, run_id, folder / ARTIFACTS)
    client.set_terminated(run_id, content["status"], end_time=content["ended_ms"])
    _write_key(client, run_id, content)
    return logged_run(client.get_run(run_id))


def copies(client: MlflowClient, experiment: str, origin: str) -> list[Any]:
    """The runs of an experiment that were copied from the run `origin`."""
    return list(client.search_runs([experiment], f"tags.{ORIGIN} = '{origin}'", max_results=100))


def _read_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Copy all artifacts of a run to a folder."""
    sizes = [file.file_size or 0 for file in _artifacts(client, run_id)]
    if sizes:
        with progress("files from MLflow", sum(sizes), "bytes") as steps, growing(folder, steps):
            client.download_artifacts(run_id, "", str(folder))


@contextmanager
def growing(folder: Path, steps: Steps) -> Iterator[None]:
    """Tell how a folder grows: MLflow does not say how far its downloads are."""
    ended = Event()

    def look() -> None:
        before = 0
        while not ended.wait(LOOK_SECONDS):
            now = 0
            for path in folder.rglob("*"):
                with suppress(FileNotFoundError):  # it got its name meanwhile
                    now += path.stat().st_size if path.is_file() else 0
            steps.advance(max(0, now - before))
            before = max(now, before)

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> Iterator[Any]:
    """`mlflow.entities.FileInfo` of every file of a run."""
    for found in client.list_artifacts(run_id, path):
        if found.is_dir:
            yield from _artifacts(client, run_id, found.path)
        else:
            yield found


def _write_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Copy all files of a folder to a run's artifacts."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    with progress("files to MLflow", sum(sizes), "bytes") as steps:
        for path, size in zip(files, sizes, strict=True):
            name = path.relative_to(folder)
            steps.advance(0, name.as_posix())
            client.log_artifact(
                run_id, str(path), name.parent.as_posix() if name.parent.name else None
            )
            steps.advance(size)


def _history(client: MlflowClient, run_id: str, name: str) -> list[list[Any]]:
    """`[step, milliseconds since 1970, value]` of each point; JSON has no NaN, so that is text."""
    return [
        [m.step, m.timestamp, m.value if math.isfinite(m.value) else repr(m.value)]
        for m in client.get_metric_history(run_id, name)
    ]


def _dataset(used: Any) -> dict[str, Any]:
    data = used.dataset
    return {
        "name": data.name,
        "digest": data.digest,
        "source_type": data.source_type,
        "source": data.source,
        "schema": data.schema,
        "profile": data.profile,
        "tags": {tag.key: tag.value for tag in used.tags},
    }


def _write_values(client: MlflowClient, run_id: str, content: dict[str, Any]) -> None:
    """All but the key itself."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    metrics = [
        Metric(name, float(value), time_ms, step)
        for name, points in content["metrics"].items()
        for step, time_ms, value in points
    ]
    with progress("metrics to MLflow", len(metrics), "points") as steps:
        for some in batched(metrics, _METRICS):
            client.log_batch(run_id, metrics=list(some))
            steps.advance(len(some))
    params = [Param(name, value) for name, value in content["params"].items() if name != KEY]
    for few in batched(params, _PARAMS):
        client.log_batch(run_id, params=list(few))
    skipped = (KEY, ORIGIN, *_NOT_COPIED)
    tags = [RunTag(name, value) for name, value in content["tags"].items() if name not in skipped]
    for part in batched(tags, _TAGS):
        client.log_batch(run_id, tags=list(part))
    inputs = []
    for data in content["datasets"]:
        fields = {name: value for name, value in data.items() if name != "tags"}
        labels = [InputTag(name, value) for name, value in data["tags"].items()]
        inputs.append(DatasetInput(Dataset(**fields), labels))
    if inputs:
        client.log_inputs(run_id, inputs)


def _write_key(client: MlflowClient, run_id: str, content: dict[str, Any]) -> None:
    from mlflow.entities import Param, RunTag

    params = [Param(KEY, content["params"][KEY])] if KEY in content["params"] else []
    key = content["tags"].get(KEY) or content["params"][KEY]
    client.log_batch(run_id, params=params, tags=[RunTag(KEY, key)])
