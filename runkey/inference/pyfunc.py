"""A recorded model as MLflow's `python_function`: image files in, detections out.

    model = mlflow.pyfunc.load_model("models:/detection@production")
    model.predict(pandas.DataFrame({"image": [Path("a.jpg").read_bytes()]}))
    model.predict(frame, params={"score": 0.3, "nms": 0.8})

MLflow's model holds this code, the weights and the thresholds, so it is served from anywhere.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from runkey.errors import DataError
from runkey.inference.detections import Detections
from runkey.inference.model import Model, load_model_folder
from runkey.inference.options import Score

OUTPUT_COLUMNS = {
    "image": "long",
    "class": "string",
    "score": "double",
    **dict.fromkeys(("x1", "y1", "x2", "y2"), "double"),
}
"""Columns of the answer, with MLflow's types."""
AUTO = -1.0
PREDICT_PARAMS: dict[str, tuple[str, float]] = {"score": ("double", AUTO), "nms": ("double", 0.0)}
"""Parameters of a request, with MLflow's type and the default; score -1: auto; nms 0: none."""


def _load_pyfunc(path: str) -> PyfuncDetector:
    """Load the model for MLflow, which passes the folder with the files of `model/`."""
    return PyfuncDetector(load_model_folder(Path(path), device="cpu"))


class PyfuncDetector:
    """A detector on the CPU that answers DataFrames."""

    def __init__(self, model: Model) -> None:
        """Args: model: as `load_model_folder` gives it."""
        self.model = model

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> Any:
        """Detect the objects of image files.

        Args:
            frame: a DataFrame with the column `image`: a file's bytes, or the same as a base64
                string; a list of those works too.
            params: `score`: least score; -1 (the default): each class's score of best F1 on the val
                images; `nms`: IoU above which the worse of two boxes of a class is dropped, 0 for
                none.

        Returns:
            DataFrame with `OUTPUT_COLUMNS`: the image's row, its detections by descending score,
            boxes in pixels of the upright image, inside it.

        Raises:
            DataError: an image cannot be read, or a parameter is not in its range.
        """
        import pandas as pd

        chosen = params or {}
        least, nms = float(chosen.get("score", AUTO)), float(chosen.get("nms", 0.0))
        if least != AUTO and not 0 <= least <= 1:
            raise DataError(f"score {least:g}: from 0 to 1, or {AUTO:g} for each class's threshold")
        if not 0 <= nms <= 1:
            raise DataError(f"nms {nms:g}: an IoU from 0 (none) to 1")
        score: Score = "auto" if least == AUTO else least
        contents = frame["image"] if hasattr(frame, "columns") else frame
        images = (_content(one, row) for row, one in enumerate(contents))
        found = self.model.stream(images, score, nms or None)
        rows = [row for number, one in enumerate(found) for row in _rows(number, one)]
        return pd.DataFrame(rows, columns=list(OUTPUT_COLUMNS))


def _rows(number: int, found: Detections) -> list[tuple[Any, ...]]:
    return [(number, one["name"], one["score"], *one["box_xyxy"]) for one in found]


def _content(image: Any, row: int) -> bytes:
    """The bytes of an image file, which JSON has as base64."""
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str):
        try:
            # A data URL holds it after a comma.
            return base64.b64decode(image.rpartition(",")[2], validate=True)
        except binascii.Error:
            raise DataError(f"image {row}: neither bytes nor base64") from None
    raise DataError(f"image {row}: {type(image).__name__}; give a file's bytes, or them as base64")
