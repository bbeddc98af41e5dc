"""A loaded model: any number and mix of images, thresholds, and what an answer converts to."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runkey.errors import DataError, LockError, ModelError
from runkey.hashing import sha256_file
from runkey.inference.detections import Detections
from runkey.inference.extras import import_extra
from runkey.inference.model import Model, load_model_folder
from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, save_model
from runkey.params import Model as ModelParams

CLASSES = (CardClass(0, 4, "ball"), CardClass(1, 9, "cube"))
SHAPES = ((60, 80), (40, 90), (60, 80), (80, 60), (120, 160))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ModelParams(hidden_dim=32, num_heads=2, feedforward_dim=48, num_queries=12)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model"
    state = build_model(model, 2).state_dict()
    save_model(path, state, ModelCard(model, CLASSES, Sizes(48, 80)))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model_folder(folder, device="cpu")


def images(count: int = len(SHAPES)) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES[:count]]


def test_one_image_and_a_list_of_mixed_shapes_and_kinds(model: Model, tmp_path: Path) -> None:
    arrays = images()
    Image.fromarray(arrays[0]).save(tmp_path / "a.png")
    mixed = [tmp_path / "a.png", Image.fromarray(arrays[1]), *arrays[2:]]
    found = model(mixed, score=0)
    assert [one.image_size for one in found] == list(SHAPES)
    for one, array in zip(found, arrays, strict=True):
        assert np.array_equal(one.image, array)
        alone = model(array, score=0)
        # A batch rounds otherwise than one image.
        assert np.allclose(one.scores, alone.scores, rtol=1e-5, atol=1e-6)
        assert len(one) == 24
        assert (np.diff(one.scores) <= 0).all()
        height, width = one.image_size
        assert (one.boxes_xyxy >= 0).all()
        assert (one.boxes_xyxy <= [width, height, width, height]).all()
    assert found[0].source == str(tmp_path / "a.png")


def test_the_batch_size_changes_no_order_and_holds_few_images(model: Model) -> None:
    read = []

    def sources():
        for number, array in enumerate(images()):
            read.append(number)
            yield array

    stream = model.stream(sources(), score=0, batch_size=2)
    assert next(stream).image_size == SHAPES[0]
    assert len(read) == 2
    assert [one.image_size for one in stream] == list(SHAPES[1:])


def write_thresholds(path: Path, weights: Path, **scores: float) -> None:
    classes = {n: {"score": s, "precision": 1, "recall": 1, "f1": 1} for n, s in scores.items()}
    content = {"iou": 0.5, "weights": sha256_file(weights), "classes": classes}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("place", ["../evaluation", "."])
def test_auto_takes_the_thresholds_of_these_weights(
    folder: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / place / "thresholds.json"
    write_thresholds(path, folder / "weights.safetensors", ball=0.25)
    try:
        model = load_model_folder(folder, device="cpu")
        assert model.card.thresholds == {"ball": 0.25}
        assert model.score_limits("auto").tolist() == [0.25, 0.5]
        assert model.score_limits({"cube": 0.75}).tolist() == [0.25, 0.75]
        assert model.score_limits(0.125).tolist() == [0.125, 0.125]
        assert not caplog.records
        (folder / "model.json").rename(folder / "card")
        write_thresholds(path, folder / "card", ball=0.25)
        (folder / "card").rename(folder / "model.json")
        with caplog.at_level(logging.INFO):
            other = load_model_folder(folder, device="cpu")
            assert other.score_limits("auto").tolist() == [0.5, 0.5]
        assert "no thresholds.json of these weights" in caplog.text
        path.write_text("{}")
        with pytest.raises(ModelError, match=r"thresholds\.json: .*Field required; `dvc repro -f"):
            load_model_folder(folder, device="cpu")
    finally:
        path.unlink()


def test_classes_of_one_name_have_thresholds_of_their_own(model: Model) -> None:
    classes = (CardClass(0, 4, "ball"), CardClass(1, 9, "ball"), CardClass(2, 11, "cube"))
    card = replace(model.card, classes=classes, thresholds={"ball (4)": 0.25, "ball (9)": 0.75})
    limits = Model(card, model.network).score_limits
    assert limits("auto").tolist() == [0.25, 0.75, 0.5]
    assert limits({"ball": 0.125}).tolist() == [0.125, 0.125, 0.5]
    assert limits({"ball": 0.125, "ball (9)": 0.375}).tolist() == [0.125, 0.375, 0.5]
    with pytest.raises(
        ModelError, match=r"no class 'bal'; the model has ball \(4\), ball \(9\), cube"
    ):
        limits({"bal": 0.5})


def test_nan_is_no_empty_answer(model: Model) -> None:
    def network(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        scores, labels, boxes = model.network(pixels)
        return scores, labels, boxes * np.float32("nan")

    with pytest.raises(ModelError, match=r"array of shape .*: the model predicts NaN"):
        Model(model.card, network)(images(1)[0])


def test_a_list_or_tuple_of_one_image_gives_a_list(model: Model) -> None:
    (image,) = images(1)
    assert len(model(image, score=0)) == 24
    for one in ([image], (image,)):
        (found,) = model(one, score=0)
        assert found.image_size == SHAPES[0]


def test_its_name_is_short(model: Model) -> None:
    card = replace(model.card, key="rk2-" + "ab" * 32)
    assert repr(Model(card, model.network)) == "Model(rk2-abababababab: 2 classes: ball, cube)"


def test_thresholds_and_unknown_names(model: Model) -> None:
    found = model(images(1)[0], score=0)
    least = float(np.median(found.scores))
    high = model(images(1)[0], score=least)
    assert 0 < len(high) < len(found)
    assert (high.scores >= np.float32(least)).all()
    balls = found.above({"cube": 2.0})
    assert set(balls.names) == {"ball"}
    assert len(balls) == found.names.count("ball")
    for refused in ("high", {"bal": 0.5}):
        with pytest.raises(ModelError, match=r"^score: "):
            model(images(1)[0], score=refused)  # type: ignore[call-overload]


def test_an_unreadable_image_is_named(model: Model, tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_text("hello")
    with pytest.raises(DataError, match=r"b\.jpg: is no image of a known format"):
        model([images(1)[0], tmp_path / "b.jpg"])


FOUND = Detections(
    boxes_xyxy=np.array([[1, 2, 31, 42], [2, 3, 32, 43], [1, 2, 31, 42], [50, 5, 70, 25]], "f4"),
    scores=np.array([0.9, 0.8, 0.7, 0.6], "f4"),
    labels=np.array([0, 0, 1, 1]),
    classes=CLASSES,
    image_size=(60, 80),
    image=np.full((60, 80, 3), 90, np.uint8),
    source="a.jpg",
)


def test_nms_is_within_a_class() -> None:
    kept = FOUND.nms(0.5)
    assert kept.scores.tolist() == np.array([0.9, 0.7, 0.6], "f4").tolist()
    assert kept.names == ["ball", "cube", "cube"]
    assert len(FOUND.nms(0.95)) == 4


def test_coco_rows_have_the_data_s_category_ids() -> None:
    rows = FOUND.to_coco(7)
    assert rows[0] == {
        "image_id": 7,
        "category_id": 4,
        "bbox": [1.0, 2.0, 30.0, 40.0],
        "score": float(np.float32(0.9)),
    }
    assert [row["category_id"] for row in rows] == [4, 4, 9, 9]
    json.dumps(rows)


def test_supervision_takes_them() -> None:
    try:
        found = FOUND.to_supervision()
    except LockError:
        pytest.skip("`make env-export` installs it")
    supervision = import_extra("supervision")
    assert isinstance(found, supervision.Detections)
    assert np.array_equal(found.xyxy, FOUND.boxes_xyxy)
    assert found.class_id.tolist() == [0, 0, 1, 1]
    assert found.data["class_name"].tolist() == FOUND.names
    drawn = supervision.BoxAnnotator().annotate(FOUND.image.copy(), found)
    assert (drawn != FOUND.image).any()
    assert len(found[found.confidence > 0.75]) == 2


def test_plain_values_and_repr() -> None:
    first = next(iter(FOUND))
    assert first["name"] == "ball"
    assert first["box_xyxy"] == [1.0, 2.0, 31.0, 42.0]
    assert repr(FOUND) == "Detections(a.jpg: ball 0.90, ball 0.80, cube 0.70 and 1 more)"
    assert repr(FOUND.above(0.95)) == "Detections(a.jpg: none)"


def test_drawing_marks_the_boxes_in_a_copy() -> None:
    large = np.full((300, 400, 3), 90, np.uint8)
    picture = replace(FOUND, image=large).draw()  # its boxes are of an image of 80 x 60
    assert picture.size == (800, 600)
    assert (large == 90).all()
    pixels = np.asarray(picture)
    assert (pixels[240, 500] == (230, 159, 0)).all()  # the second class's orange, left edge
    assert (pixels[200, 600] == 90).all()
    bare = Detections(FOUND.boxes_xyxy, FOUND.scores, FOUND.labels, CLASSES, (60, 80))
    with pytest.raises(ModelError, match="not kept"):
        bare.draw()
