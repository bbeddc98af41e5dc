"""A recorded model as MLflow's `python_function`: image files in, detections out.

    model = mlflow.pyfunc.load_model("models:/m-...")
    model.predict(pandas.DataFrame({"image": [Path("a.jpg").read_bytes()]}))

MLflow's model holds no second copy of the weights: it names the run, whose `model/` is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from runkey.evaluation.run import detect
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

    run_id = json.loads((Path(path) / _RUN_JSON).read_text(encoding="utf-8"))["run_id"]
    return PyfuncDetector(
        *load_model(Path(download_artifacts(run_id=run_id, artifact_path="model")))
    )


class PyfuncDetector:
    """A detector on the CPU, one image at a time."""

    def __init__(self, detector: Detector, card: ModelCard) -> None:
        """Wrap a detector and its card."""
        self._detector = detector
        self._postprocess = build_postprocess(card.model)
        self._names = [one.name for one in card.classes]
        self._sizes = card.sizes

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """Detect objects.

        Args:
            frame: DataFrame; its column `image` holds the bytes of image files.
            params: not used; MLflow passes it.

        Returns:
            DataFrame with `PYFUNC_COLUMNS`: the image's row, its detections by descending score,
            boxes in pixels of the image as `preprocess` rotates it.
        """
        import pandas as pd

        batches = (
            preprocess(content, self._sizes, number)
            for number, content in enumerate(frame["image"])
        )
        found = detect(self._detector, self._postprocess, batches, torch.device("cpu"))
        rows = [
            (number, self._names[label], score, *box)
            for number, of_image in found.items()
            for label, score, box in zip(
                of_image.labels.tolist(),
                of_image.scores.tolist(),
                of_image.boxes_xyxy.tolist(),
                strict=True,
            )
        ]
        return pd.DataFrame(rows, columns=list(PYFUNC_COLUMNS))
