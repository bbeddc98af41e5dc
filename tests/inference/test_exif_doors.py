"""One photograph, stored in each of EXIF's eight ways: every door finds the same upright boxes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from runkey.data.index import read_index
from runkey.data.loader import build_eval_loader
from runkey.data.prepare import prepare
from runkey.evaluation.run import detect
from runkey.inference.model import load_model_folder
from runkey.inference.preprocess import read_image
from runkey.inference.pyfunc import _load_pyfunc
from runkey.model.postprocess import build_postprocess
from runkey.model.weights import load_model
from runkey.params import Data
from tests.support.small_model import photograph
from tests.support.workspace import loader_params

T = Image.Transpose
# What turns the upright picture into the stored one.
STORED = {
    **{1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM},
    **{5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270},
}
UPRIGHT = photograph(5, 90, 60)


def stored(orientation: int) -> bytes:
    """The photograph as a phone stores it, without loss."""
    turn, exif, file = STORED[orientation], Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture = UPRIGHT.transpose(turn) if turn is not None else UPRIGHT
    picture.save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The eight files as val images, whose JSON states the upright size."""
    for split, numbers in (("train", [1]), ("val", list(STORED))):
        (tmp_path / "data" / split).mkdir(parents=True)
        images, annotations = [], []
        for number in numbers:
            image_id = number if split == "val" else 100
            (tmp_path / "data" / split / f"{number}.png").write_bytes(stored(number))
            size = {"width": UPRIGHT.width, "height": UPRIGHT.height}
            images.append({"id": image_id, "file_name": f"{number}.png", **size})
            box = {"bbox": [10, 10, 30, 20], "category_id": 4, "iscrowd": 0, "area": 600}
            annotations.append({"id": image_id, "image_id": image_id, **box})
        (tmp_path / "data/annotations").mkdir(exist_ok=True)
        names = [{"id": 4, "name": "ball"}, {"id": 9, "name": "cube & more"}]
        content = {"images": images, "annotations": annotations, "categories": names}
        path = tmp_path / f"data/annotations/instances_{split}.json"
        path.write_text(json.dumps(content))
    UPRIGHT.rotate(3).save(tmp_path / "data/train/1.png")  # no copy of a val image
    return tmp_path


def test_all_doors_find_the_same_boxes(root: Path, small_model_folder: Path) -> None:
    data = Data(path="data", short_sides=(48,), long_side=80)
    prepare(data, root, root / "prepared", 12)
    records = read_index(root / "prepared/val.safetensors")
    assert {(r.width, r.height) for r in records} == {UPRIGHT.size}
    detector, card = load_model(small_model_folder)
    loader = build_eval_loader(loader_params(data, batch_size=8), root)
    evaluated = detect(detector, build_postprocess(card.model), loader, torch.device("cpu"))
    model = load_model_folder(small_model_folder, device="cpu")
    wanted = model(UPRIGHT, score=0)
    assert len(wanted) == 24
    assert wanted.image_size == (60, 90)
    frame = pd.DataFrame({"image": [stored(number) for number in STORED]})
    served = _load_pyfunc(str(small_model_folder)).predict(frame, {"score": 0.0})
    for row, number in enumerate(STORED):
        path = root / "data/val" / f"{number}.png"
        assert np.array_equal(read_image(path), np.asarray(UPRIGHT))
        loaded = model(path, score=0)
        assert np.array_equal(loaded.boxes_xyxy, wanted.boxes_xyxy)
        assert np.array_equal(loaded.scores, wanted.scores)
        rows = served[served["image"] == row]
        others = (
            (rows["score"].to_numpy(), rows[["x1", "y1", "x2", "y2"]].to_numpy()),
            (evaluated[number].scores.numpy(), evaluated[number].boxes_xyxy.numpy()),
        )
        for scores, boxes_xyxy in others:
            # A batch rounds otherwise than one image.
            assert np.allclose(scores, wanted.scores, rtol=1e-5, atol=1e-6)
            assert np.allclose(boxes_xyxy[:4], wanted.boxes_xyxy[:4], rtol=1e-4, atol=1e-3)
