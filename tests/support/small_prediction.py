"""Records of an index, and the prediction of a small training, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runkey.data.index import ClassName, ImageRecord, write_classes, write_index
from runkey.memory.batch_shapes import prepared_shapes
from runkey.memory.predict import Prediction, predict
from runkey.params import Params, load_params, override
from runkey.pipeline.step_factory import step_factory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def make_record() -> Callable[..., ImageRecord]:
    """A record of an image of some size, with boxes in its middle."""

    def make(image_id: int, width: int, height: int, boxes: int, crowds: int = 0) -> ImageRecord:
        count = boxes + crowds
        return ImageRecord(
            id=image_id,
            file=f"{image_id}.png",
            width=width,
            height=height,
            rotate=0,
            mirror=False,
            boxes_xywh=tuple((width / 4 + i, height / 4, width / 2, 9.0) for i in range(count)),
            labels=(0,) * count,
            areas=(81.0,) * count,
            crowd=(False,) * boxes + (True,) * crowds,
            annotation_ids=tuple(range(count)),
        )

    return make


@pytest.fixture(scope="session")
def small_params() -> Params:
    """The sample's training with one layer each, in bf16 on a GPU."""
    return override(
        load_params(ROOT / "presets/sample.yaml"),
        {
            "model.decoder_layers": 1,
            "training.batch_size": 5,
            "data.short_sides": (90,),
            "data.long_side": 120,
            "runtime.device": "cpu",
        },
    )


@pytest.fixture(scope="session")
def prepared(
    make_record: Callable[..., ImageRecord], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What prepare leaves of twelve images of one size; no image is there."""
    folder = tmp_path_factory.mktemp("workspace") / "prepared"
    folder.mkdir()
    records = [make_record(i, 160, 120, boxes=i % 7) for i in range(12)]
    write_index(folder / "train.safetensors", records)
    write_classes(folder / "classes.json", [ClassName(i, i + 1, str(i)) for i in range(8)])
    return folder


@pytest.fixture(scope="session")
def prediction(small_params: Params, prepared: Path) -> Prediction:
    """The prediction of it, on those images."""
    shapes = prepared_shapes(small_params, prepared)
    return predict(small_params, shapes, lambda other: step_factory(other, shapes.num_classes))
