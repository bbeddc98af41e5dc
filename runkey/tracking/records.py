"""What MLflow has of a run, in the form that the registry keeps and compares."""

from __future__ import annotations

import json
import tempfile
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runkey.identity.record import DETAILS, NOT_KEPT, Details, LoggedRun
from runkey.tracking.store import Store, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient


def logged_run(run: Any) -> LoggedRun:
    """The parts of an `mlflow.entities.Run` that a record holds."""
    info, data = run.info, run.data
    return LoggedRun(
        run_id=info.run_id,
        experiment_id=str(info.experiment_id),
        name=info.run_name or "",
        status=info.status,
        started_ms=info.start_time,
        # MLflow keeps the time of the end when a run goes on.
        ended_ms=None if info.status == "RUNNING" else info.end_time,
        artifact_uri=info.artifact_uri,
        params=dict(sorted(data.params.items())),
        metrics={n: v for n, v in sorted(data.metrics.items()) if not n.startswith(NOT_KEPT)},
        tags={n: v for n, v in sorted(data.tags.items()) if not n.startswith("mlflow.")},
    )


def read_details(client: MlflowClient, run: LoggedRun) -> Details | None:
    """The details that a run wrote as its artifact; None if it ended before.

    Raises:
        RecipeError: the artifact is not a run's record.
        MlflowException, OSError: the artifacts cannot be reached.
    """
    where = f"{DETAILS} of run {run.run_id}"
    parts = urllib.parse.urlsplit(run.artifact_uri)
    if parts.scheme == "file":
        # Past MLflow, which takes 20 ms a file: `runkey index` reads thousands.
        path = Path(urllib.parse.unquote(parts.path)) / DETAILS
        if not path.is_file():
            return None
        return Details.from_dict(json.loads(path.read_text(encoding="utf-8")), where)
    if DETAILS not in {item.path for item in client.list_artifacts(run.run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(client.download_artifacts(run.run_id, DETAILS, folder))
        return Details.from_dict(json.loads(path.read_text(encoding="utf-8")), where)


def write_details(
    store: Store, run_id: str, details: Details, tags: dict[str, str] | None = None
) -> LoggedRun:
    """Replace the details of a recorded run, and set tags; the run as it then stands.

    Raises:
        TrackingError: the store cannot be opened.
        MlflowException: it refuses.
    """
    client = open_client(store)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DETAILS
        path.write_text(details.as_json(), encoding="utf-8")
        client.log_artifact(run_id, str(path))
    for name, value in (tags or {}).items():
        client.set_tag(run_id, name, value)
    return logged_run(client.get_run(run_id))
