"""One run's tracker: the JSONL log always, MLflow where it is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runkey.tracking.jsonl import JsonlLog
from runkey.tracking.mlflow_tracker import MlflowTracker, Status


class RunTracker:
    """Sends everything to both.  Implements training's `Tracker`; nothing here ever raises."""

    def __init__(self, jsonl: JsonlLog, mlflow: MlflowTracker | None) -> None:
        """Args: jsonl: the log file.  mlflow: the MLflow run, or None for the file alone."""
        self.jsonl = jsonl
        self.mlflow = mlflow

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one optimizer step."""
        self.jsonl.log(values, step)
        if self.mlflow:
            self.mlflow.log(values, step)

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened."""
        self.jsonl.event(kind, **fields)
        if self.mlflow:
            self.mlflow.event(kind, **fields)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, or of a folder's files, with the MLflow run."""
        if self.mlflow:
            self.mlflow.artifact(path, folder)

    def run_id(self, wait_seconds: float = 30.0) -> str | None:
        """The MLflow run's id; None without MLflow, or when it could not be made in time."""
        return self.mlflow.wait_for_run(wait_seconds) if self.mlflow else None

    def close(self, status: Status = "FINISHED") -> str | None:
        """End the run.  Returns its MLflow id, None if there is none."""
        if self.mlflow and not self.jsonl.lost_lines:
            self.mlflow.artifact(self.jsonl.path, "logs")
        self.jsonl.close()
        return self.mlflow.close(status) if self.mlflow else None
