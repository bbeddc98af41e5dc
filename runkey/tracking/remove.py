"""Delete a run from MLflow."""

from __future__ import annotations

from runkey.errors import TrackingError
from runkey.tracking.store import Store, open_client


def delete_run(store: Store, run_id: str) -> None:
    """Put a run into MLflow's trash, where `mlflow gc` finds it; its artifacts are left alone.

    A run that is there already, or that MLflow does not know, is no error.

    Raises:
        TrackingError: the store cannot be reached, or refuses.
    """
    client = open_client(store)
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage != "deleted":
            client.delete_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(f"run {run_id}: not deleted from MLflow: {error.message}") from None
