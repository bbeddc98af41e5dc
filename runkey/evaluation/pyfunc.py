"""A recorded model as MLflow's `python_function`: image files in, detections out.

    model = mlflow.pyfunc.load_model("models:/m-...")
    model.predict(pandas.DataFrame({"image": [Path("a.jpg").read_bytes()]}))

MLflow's model holds no second copy of the weights: it names the run, whose `model/` is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runkey.evaluation.run import detect
from runkey.files import read_json
from runkey.inference.preprocess import preprocess
from runkey.model.detr import Detector
from runkey.model.postprocess import build_postprocess
from runkey.model.weights import ModelCard, load_model

_RUN_JSON = "run.json"
"""File in MLflow's model: {"run_id": ...}."""
PYFUNC_COLUMNS = {
    "image": "long",
    "class": "string",
    "score": "double",
    **dict.fromkeys(("x1", "y1", "x2", "y2"), "double"),
}
"""Columns of the answer, with MLflow's types."""


def _load_pyfunc(path: str) -> PyfuncDetector:
    """Load the model for MLflow, which passes the folder that holds `_RUN_JSON`."""
    from mlflow.artifacts import download_artifacts

    run_id = read_json(Path(path) / _RUN_JSON)["run_id"]
    return PyfuncDetector(
        *load_model(Path(download_artifacts(run_id=run_id, artifact_path="model")))
    )


@dataclass(frozen=True)
class PyfuncDetector:
    """A detector on the CPU, one image at a time."""

    detector: Detector
    card: ModelCard

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """Detect the objects of image files, whose bytes are the column `image` of a DataFrame.

        Returns:
            DataFrame with `PYFUNC_COLUMNS`: the image's row, its detections by descending score,
            boxes in pixels of the image as `preprocess` rotates it.
        """
        import pandas as pd

        batches = (
            preprocess(content, self.card.sizes, number)
            for number, content in enumerate(frame["image"])
        )
        postprocess = build_postprocess(self.card.model)
        found = detect(self.detector, postprocess, batches, torch.device("cpu"))
        rows = [
            (number, self.card.classes[label].name, score, *box)
            for number, of_image in found.items()
            for label, score, box in zip(
                of_image.labels.tolist(),
                of_image.scores.tolist(),
                of_image.boxes_xyxy.tolist(),
                strict=True,
            )
        ]
        return pd.DataFrame(rows, columns=list(PYFUNC_COLUMNS))
