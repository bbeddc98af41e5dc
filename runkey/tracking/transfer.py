"""Read and write whole MLflow runs: delete, and copy from one store to another via a folder.

A copy is an MLflow run like any other, with an id of its own. `runkey.identity.record` describes
the folder's layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from runkey.errors import TrackingError
from runkey.files import LARGE, json_safe, read_json
from runkey.identity.record import (
    ARTIFACTS,
    CONTENT,
    DETAILS,
    KEY,
    ORIGIN,
    Details,
    LoggedRun,
)
from runkey.identity.record_cache import update_record
from runkey.progress import Steps, each, progress
from runkey.tracking.describe import copied_name
from runkey.tracking.store import (
    MAX_METRICS,
    Store,
    experiment_id,
    tracked,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from runkey.params import Params

LOOK_SECONDS = 0.3
_MOST_FILES, _DEEPEST = 20_000, 30
"""Of one run, when it is read; a server may name folders without end."""
_NOT_COPIED = ("mlflow.runName", "mlflow.artifactLocation")


def logged_run(run: Any) -> LoggedRun:
    """Convert an `mlflow.entities.Run` to the part of it that a record holds."""
    return LoggedRun.from_mlflow(dict(run.info), run.data.params, run.data.metrics, run.data.tags)


def write_details(
    store: Store, run_id: str, details: Details, tags: Mapping[str, str] = {}
) -> LoggedRun:
    """Replace record.json of a run and set tags; return the run as it is then.

    TrackingError if the store cannot be reached, or refuses.
    """
    with tracked(store, f"run {run_id} could not be changed") as client:
        client.log_text(run_id, details.as_json(), DETAILS)
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
        return logged_run(client.get_run(run_id))


def delete_run(store: Store, run_id: str) -> None:
    """Move a run and its models to MLflow's trash (for `mlflow gc`); leave its artifacts alone.

    Versions of registered models that are of the run are deleted. A run that is in the trash
    already, or that MLflow does not know, is no error.

    Raises:
        TrackingError: the store cannot be reached, or refuses.
    """
    with tracked(store, f"run {run_id} could not be deleted") as client:
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage != "deleted":
                for model in run.outputs.model_outputs if run.outputs else ():
                    client.delete_logged_model(model.model_id)
                for one in client.search_model_versions(f"run_id = '{run_id}'"):
                    client.delete_model_version(one.name, one.version)
                client.delete_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


@dataclass(frozen=True)
class StoreRuns:
    """The runs of a store, as the protocol `runkey.registry.package.Runs` asks for."""

    store: Store
    experiment: str
    """Name of the experiment that copies go to."""
    baseline: Params | None = None
    """The committed parameters of this checkout, to name copies of other checkouts' runs by what
    differs; None: copies keep their names."""

    def read(self, run_id: str, folder: Path) -> dict[str, Any]:
        """Copy a run to `CONTENT` and `ARTIFACTS` in a folder that exists; return the `CONTENT`."""
        if (database := self.store.database) and not database.is_file():  # MLflow would make one
            raise TrackingError(f"{database}: not found; put it back to read run {run_id}")
        with tracked(self.store, f"run {run_id} could not be read") as client:
            run = client.get_run(run_id)
            inputs = run.inputs.dataset_inputs if run.inputs else []
            content = {
                "schema": "run1",
                "run_id": run_id,
                "name": run.info.run_name or "",
                "status": run.info.status,
                "started_ms": run.info.start_time,
                "ended_ms": run.info.end_time,
                "params": dict(run.data.params),
                "tags": {n: v for n, v in run.data.tags.items() if n not in _NOT_COPIED},
                # Step, milliseconds since 1970 and value of each point.
                "metrics": {
                    name: [
                        [point.step, point.timestamp, json_safe(point.value)]
                        for point in client.get_metric_history(run_id, name)
                    ]
                    for name in each("metrics from MLflow", sorted(run.data.metrics), "metrics")
                },
                "datasets": [
                    used.dataset.to_dictionary() | {"tags": {t.key: t.value for t in used.tags}}
                    for used in inputs
                ],
            }
            text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
            (folder / CONTENT).write_text(text + "\n", encoding="utf-8")
            (folder / ARTIFACTS).mkdir()
            _read_files(client, run_id, folder / ARTIFACTS)
        return content

    def write(self, folder: Path) -> LoggedRun:
        """Copy a run from the folder that `read` filled; write its record.

        The key is written last, so that no search by key finds an incomplete copy. What an
        interrupted copy of the same run left is deleted first.
        """
        with tracked(self.store, "the run could not be written") as client:
            from mlflow.entities import Param, RunTag

            content = read_json(folder / CONTENT, most=LARGE)
            origin = content["tags"].get(ORIGIN, content["run_id"])
            where = experiment_id(client, self.store, self.experiment)
            for half in client.search_runs([where], f"tags.{ORIGIN} = '{origin}'", max_results=100):
                if KEY not in half.data.tags:
                    client.delete_run(half.info.run_id)
                    if self.store.artifacts:
                        shutil.rmtree(self.store.artifacts / half.info.run_id, ignore_errors=True)
            key = content["tags"].get(KEY) or content["params"][KEY]
            name = copied_name(content["name"], key, content["params"], self.baseline)
            made = client.create_run(where, content["started_ms"], {ORIGIN: origin}, name)
            run_id = str(made.info.run_id)
            _write_values(client, run_id, content)
            _write_files(client, run_id, folder / ARTIFACTS)
            client.set_terminated(run_id, content["status"], end_time=content["ended_ms"])
            params = [Param(KEY, content["params"][KEY])] if KEY in content["params"] else []
            client.log_batch(run_id, params=params, tags=[RunTag(KEY, key)])
            run = logged_run(client.get_run(run_id))
        update_record(self.store.cache, run, Details.read(folder / ARTIFACTS / DETAILS))
        return run

    def add(self, run_id: str, file: Path) -> None:
        """Add a file to a run's artifacts."""
        with tracked(self.store, f"{file.name} could not be added to run {run_id}") as client:
            client.log_artifact(run_id, str(file))


def _read_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    sizes: list[int] = []
    folders: list[str | None] = [None]
    count = 0
    while folders:
        for found in client.list_artifacts(run_id, folders.pop()):
            count += 1
            if count > _MOST_FILES or found.path.count("/") > _DEEPEST:
                raise TrackingError(f"run {run_id}: it has too many files, or too deep a folder")
            if found.is_dir:
                folders.append(found.path)
            else:
                sizes.append(found.file_size or 0)
    if sizes:
        with progress("files from MLflow", sum(sizes), "bytes") as steps, growing(folder, steps):
            client.download_artifacts(run_id, "", str(folder))


@contextmanager
def growing(folder: Path, steps: Steps) -> Iterator[None]:
    """Advance the progress by a folder's growth: MLflow does not report its downloads' progress."""
    ended = Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            size = 0
            for path in folder.rglob("*"):
                with suppress(FileNotFoundError):  # it was renamed meanwhile
                    size += path.stat().st_size if path.is_file() else 0
            steps.advance(max(0, size - steps.done))

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _write_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    with progress("files to MLflow", sum(sizes.values()), "bytes") as steps:
        for path, size in sizes.items():
            name = path.relative_to(folder)
            steps.advance(0, name.as_posix())
            inner = name.parent.as_posix() if name.parent.name else None
            client.log_artifact(run_id, str(path), inner)
            steps.advance(size)


def _write_values(client: MlflowClient, run_id: str, content: dict[str, Any]) -> None:
    """Write metrics, params, tags and data sets, but not the key."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    metrics = [
        Metric(name, float(value), time_ms, step)
        for name, points in content["metrics"].items()
        for step, time_ms, value in points
    ]
    with progress("metrics to MLflow", len(metrics), "points") as steps:
        for some in batched(metrics, MAX_METRICS):
            client.log_batch(run_id, metrics=list(some))
            steps.advance(len(some))
    params = [Param(name, value) for name, value in content["params"].items() if name != KEY]
    skipped = (KEY, ORIGIN, *_NOT_COPIED)
    tags = [RunTag(name, value) for name, value in content["tags"].items() if name not in skipped]
    client.log_batch(run_id, params=params, tags=tags)
    inputs = []
    for data in content["datasets"]:
        labels = [InputTag(name, value) for name, value in data.pop("tags").items()]
        inputs.append(DatasetInput(Dataset(**data), labels))
    if inputs:
        client.log_inputs(run_id, inputs)
