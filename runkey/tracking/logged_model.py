"""A run's model as MLflow shows it: with a signature, an example, and the run that made it.

`mlflow.pytorch.log_model` traces and pickles the model (10 s) and keeps its weights a second time.
What is written here is small: MLflow's description, the example, and the run's id.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from runkey.errors import TrackingError
from runkey.tracking.store import Store, open_client

_LOADER = "runkey.evaluation.pyfunc"
_POINTER = "run.json"
_NEEDED = ("mlflow", "numpy", "pandas", "pillow", "torch", "torchvision")


def log_model(
    store: Store,
    run_id: str,
    name: str,
    example: Path,
    outputs: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """Record the model of a run, once.

    Args:
        store: where the run is.
        run_id: MLflow's id; its artifacts hold `model/`.
        name: of the model.
        example: an image file.
        outputs: MLflow type by name of the columns that the model answers.
        tags: of the model.

    Returns:
        MLflow's id of the model; that of an earlier one, if the run has one.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    client = open_client(store)
    with warnings.catch_warnings():
        # When they are imported: MLflow of its own type hints, its parts of what is outdated.
        warnings.simplefilter("ignore")
        import pandas as pd
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException
        from mlflow.models.signature import ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types.schema import ColSpec, Schema

    signature = ModelSignature(
        Schema([ColSpec("binary", "image")]),
        Schema([ColSpec(kind, column) for column, kind in outputs.items()]),
    )
    # MLflow compares column names with a range, which pandas 3 refuses for its own kind of text.
    columns = pd.Index(["image"], dtype=object)
    try:
        run = client.get_run(run_id)
        if run.outputs and run.outputs.model_outputs:
            return str(run.outputs.model_outputs[0].model_id)
        model = client.create_logged_model(
            run.info.experiment_id, name, source_run_id=run_id, tags=dict(tags)
        )
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            data.mkdir()
            (data / _POINTER).write_text(json.dumps({"run_id": run_id}) + "\n", encoding="utf-8")
            save_model(
                f"{folder}/model",
                loader_module=_LOADER,
                data_path=str(data),
                signature=signature,
                input_example=pd.DataFrame([[example.read_bytes()]], columns=columns),
                pip_requirements=[f"{package}=={version(package)}" for package in _NEEDED],
            )
            client.log_model_artifacts(model.model_id, f"{folder}/model")
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    except (MlflowException, OSError) as error:
        text = " ".join(str(error).split())
        raise TrackingError(f"MLflow: the model is not recorded ({text[:160]})") from None
    return str(model.model_id)
