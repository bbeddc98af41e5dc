"""Record a training run: in a JSONL log always, in MLflow when it can be reached.

Importing this package does not import mlflow, which takes 5 s; a thread does that during training.
"""

from __future__ import annotations

from runkey.tracking.describe import Dataset, RunDescription, describe_run
from runkey.tracking.log import JsonlLog
from runkey.tracking.mlflow_run import SAMPLES, TRAIN_LOG, TrackedRun, open_run
from runkey.tracking.store import Store, locate_store
from runkey.tracking.sync import RunSender, TrainingRun

__all__ = [
    "SAMPLES",
    "TRAIN_LOG",
    "Dataset",
    "JsonlLog",
    "RunDescription",
    "RunSender",
    "Store",
    "TrackedRun",
    "TrainingRun",
    "describe_run",
    "locate_store",
    "open_run",
]
