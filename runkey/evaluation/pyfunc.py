"""A recorded model as MLflow's `python_function`: encoded images in, detections out.

    model = mlflow.pyfunc.load_model("models:/m-...")
    model.predict(pandas.DataFrame({"image": [Path("a.jpg").read_bytes()]}))

MLflow's model holds no second copy of the weights: it names the run, whose `model/` is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from runkey.data.cache import cached_size
from runkey.data.dataset import Batch
from runkey.data.decode import open_image, to_rgb
from runkey.data.normalise import normalise
from runkey.model.detector import Detector
from runkey.model.model_files import ModelCard, load_model
from runkey.model.postprocess import build_postprocess

POINTER = "run.json"
"""File in MLflow's model: {"run_id": ...}."""
COLUMNS = {
    "image": "long",
    "class": "string",
    "score": "double",
    **dict.fromkeys(("x1", "y1", "x2", "y2"), "double"),
}
"""What it answers: MLflow's type by name."""


def _load_pyfunc(path: str) -> PyfuncDetector:
    """What MLflow calls with the folder that holds `POINTER`."""
    from mlflow.artifacts import download_artifacts

    run_id = json.loads((Path(path) / POINTER).read_text(encoding="utf-8"))["run_id"]
    return PyfuncDetector(
        *load_model(Path(download_artifacts(run_id=run_id, artifact_path="model")))
    )


class PyfuncDetector:
    """A detector on the CPU, one image at a time."""

    def __init__(self, detector: Detector, card: ModelCard) -> None:
        """Args: detector: in evaluation mode.  card: what belongs to it."""
        self._detector = detector
        self._postprocess = build_postprocess(card.model)
        self._names = [one.name for one in card.classes]
        self._sizes = card.sizes

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """Detect.

        Args:
            frame: DataFrame; its column `image` holds the bytes of image files.
            params: of no use here; MLflow hands it on.

        Returns:
            DataFrame with `COLUMNS`: the image's row, its detections best first, boxes in pixels.
        """
        import pandas as pd

        rows = [
            (number, *found)
            for number, content in enumerate(frame["image"])
            for found in self._detect(content)
        ]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _detect(self, content: bytes) -> list[tuple[Any, ...]]:
        with open_image(content) as opened:
            image = to_rgb(opened)
        size = cached_size(
            image.width, image.height, (self._sizes.short_side,), self._sizes.long_side
        )
        pixels = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
        batch = Batch(
            images=torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None],
            sizes=torch.tensor([[pixels.height, pixels.width]]),
            boxes_cxcywh=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            counts=(0,),
            image_ids=(0,),
            original_sizes=torch.tensor([[image.height, image.width]]),
        )
        with torch.inference_mode():
            found = self._postprocess(self._detector(*normalise(batch)), batch.original_sizes)[0]
        names = [self._names[label] for label in found.labels.tolist()]
        return [
            (name, score, *box)
            for name, score, box in zip(
                names, found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True
            )
        ]
