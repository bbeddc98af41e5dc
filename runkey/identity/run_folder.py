"""How an MLflow run lies in a folder on its way from one store to another.

run.json       name, status, times, params, tags, data sets, and every metric with its history
artifacts/     the run's files
"""

from __future__ import annotations

SCHEMA = "run1"
CONTENT = "run.json"
ARTIFACTS = "artifacts"
ORIGIN = "origin_run_id"
"""Tag of a copy: MLflow id of the run that was first made, however often it was handed on."""
