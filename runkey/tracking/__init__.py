"""Where a run writes: a JSONL file always, MLflow when it is there.

    tracker = open_run(params, root, folder, key=..., parts=..., tags=..., counts=..., say=print)
    tracker.log({"train/loss": 1.5}, step=10)
    run_id = tracker.close()

Importing this package imports no mlflow: that costs 5 s, which a thread spends during training.
"""

from __future__ import annotations

from runkey.tracking.describe import (
    Dataset,
    RunDescription,
    describe_run,
    read_dataset,
    run_name,
)
from runkey.tracking.log import JsonlLog
from runkey.tracking.mlflow_run import (
    SAMPLES,
    TRAIN_LOG,
    MlflowTracker,
    RunTracker,
    open_run,
    reopen_run,
)
from runkey.tracking.store import Store, locate_store
from runkey.tracking.sync import Training

__all__ = [
    "SAMPLES",
    "TRAIN_LOG",
    "Dataset",
    "JsonlLog",
    "MlflowTracker",
    "RunDescription",
    "RunTracker",
    "Store",
    "Training",
    "describe_run",
    "locate_store",
    "open_run",
    "read_dataset",
    "reopen_run",
    "run_name",
]
