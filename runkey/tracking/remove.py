"""Delete a run from MLflow."""

from __future__ import annotations

from runkey.errors import TrackingError
from runkey.tracking.store import Store, open_client


def delete_run(store: Store, run_id: str) -> None:
    """Put a run and its models into MLflow's trash, for `mlflow gc`; artifacts are left alone.

    A run that is there already, or that MLflow does not know, is no error.

    Raises:
        TrackingError: the store cannot be reached, or refuses.
    """
    client = open_client(store)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage != "deleted":
            for model in run.outputs.model_outputs if run.outputs else ():
                client.delete_logged_model(model.model_id)
            client.delete_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(f"run {run_id}: not deleted from MLflow: {error.message}") from None
