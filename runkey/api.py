"""Use a trained model in Python: what `import runkey` gives.

import runkey

model = runkey.load("rk2-b247")
found = model("photo.jpg")
print(found.names, found.scores, found.boxes_xyxy)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from runkey.inference.detections import Detections as Detections
from runkey.inference.model import Model as Model
from runkey.inference.model import load_model_folder
from runkey.pipeline.find_model import find_model

if TYPE_CHECKING:
    import torch


def load(
    reference: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    trust: bool = False,
) -> Model:
    """Load a trained model.

    A run is looked up in the store of the current repository, or that `MLFLOW_TRACKING_URI` names;
    its files are copied once into `.runkey/models/` beside the store, and their hashes are checked.

    Args:
        reference: a run's key or the beginning of one (`rk2-b247`, `b247`), a folder (`model/`,
            what `runkey get` or `runkey export-model` wrote), an exported file (`model.onnx`),
            `runs:/ID` with an MLflow id, or `models:/NAME@ALIAS` of MLflow's model registry.
        device: such as `cpu` or `cuda:1`; None: the GPU if there is one.
        trust: load a torch export (`model.pt2`) too, which can execute code that is in it.

    Returns:
        A model to be called with an image or a list of them; see `Model.__call__`.

    Raises:
        ModelError: a folder or file holds no model, a damaged one, or a torch export that is not
            trusted.
        RegistryError: no such run, or its files are missing or changed.
    """
    return load_model_folder(find_model(reference), device, trust=trust)
