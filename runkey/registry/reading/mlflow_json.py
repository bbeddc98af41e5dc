"""Runs as MLflow's REST interface writes them.

`runkey.tracking.records.logged_run` makes the same of what MLflow's client gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runkey.identity.record import NOT_KEPT, LoggedRun, Status

_STATUS: dict[str, Status] = {
    "RUNNING": "RUNNING",
    "SCHEDULED": "RUNNING",
    "FINISHED": "FINISHED",
    "FAILED": "FAILED",
    "KILLED": "KILLED",
}
_OWN = "mlflow."


def run_from_json(answer: Mapping[str, Any]) -> LoggedRun:
    """A run of `runs/search` or `runs/get`.

    Numbers of 64 bits come as numbers or as strings, NaN and Infinity as strings.
    """
    info, data = answer["info"], answer.get("data", {})
    tags = _pairs(data, "tags")
    ended = info.get("end_time")
    return LoggedRun(
        run_id=str(info["run_id"]),
        experiment_id=str(info["experiment_id"]),
        name=str(info.get("run_name") or tags.get("mlflow.runName", "")),
        status=_STATUS[info["status"]],
        started_ms=int(info["start_time"]),
        ended_ms=int(ended) if ended else None,
        artifact_uri=str(info["artifact_uri"]),
        params=_pairs(data, "params"),
        metrics={
            name: float(value)
            for name, value in _pairs(data, "metrics").items()
            if not name.startswith(NOT_KEPT)
        },
        tags={name: value for name, value in tags.items() if not name.startswith(_OWN)},
    )


def _pairs(data: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Values by name, sorted; an empty text is left out of the answer."""
    return dict(sorted((one["key"], str(one.get("value", ""))) for one in data.get(kind, ())))
