"""What MLflow serves is what `evaluate` judges: the same detections of the same files."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

from runkey.data.index import ClassName, ImageRecord, read_classes, read_index
from runkey.data.loader import build_eval_loader, is_cached
from runkey.data.prepare import prepare
from runkey.errors import DataError
from runkey.evaluation.run import detect, evaluate_detections
from runkey.inference.preprocess import Preprocess, read_image
from runkey.inference.pyfunc import _load_pyfunc
from runkey.model.detr import Detector, build_model
from runkey.model.postprocess import Detections, build_postprocess
from runkey.model.weights import CardClass, ModelCard, Sizes, save_model
from runkey.params import Checks, Data, Model
from tests.support.workspace import loader_params

SAMPLE = Path(__file__).parents[2] / "sample-data/files/md5"
CHECKS = Checks(exif_rotation="fix", unusual_mode="fix", size_mismatch="fix")
MODEL = Model(hidden_dim=32, num_heads=2, feedforward_dim=48, num_queries=12)
SIZES = Sizes(96, 128)
CPU = torch.device("cpu")
ORIENTATION = 0x0112


def turned_by_exif(image: Image.Image) -> bytes:
    """A JPEG that lies on its side, with the tag that has viewers turn it upright."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(image.rotate(90, expand=True), "JPEG", exif=exif)


def transparent(image: Image.Image) -> bytes:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encoded(image, "PNG")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


ODD = {
    0: turned_by_exif,
    1: lambda image: encoded(image.convert("CMYK"), "JPEG"),
    2: transparent,
    3: lambda image: encoded(image.convert("L").convert("P"), "PNG"),
    # Half the size that the JSON says.
    4: lambda image: encoded(image.reduce(2), "PNG"),
}
"""Some of the images are made into these; the rest stay the sample's own JPEGs."""


@dataclass(frozen=True)
class Prepared:
    """Ten of the sample's held-out images after `prepare`, and a model that nobody trained."""

    root: Path
    data: Data
    records: list[ImageRecord]
    classes: list[ClassName]
    detector: Detector

    def evaluated(self) -> dict[int, Detections]:
        """As `evaluate` detects."""
        loader = build_eval_loader(loader_params(self.data, cached=True), self.root)
        return detect(self.detector, build_postprocess(MODEL), loader, CPU)

    def served(self) -> dict[int, Detections]:
        """As MLflow's model answers."""
        classes = tuple(CardClass(c.index, c.id, c.name) for c in self.classes)
        folder = self.root / "model"
        save_model(folder, self.detector.state_dict(), ModelCard(MODEL, classes, SIZES))
        served = _load_pyfunc(str(folder))
        files = [(self.root / "data" / record.file).read_bytes() for record in self.records]
        answer = served.predict(pd.DataFrame({"image": files}), {"score": 0})
        index = {c.name: c.index for c in self.classes}
        return {
            self.records[number].id: Detections(
                torch.tensor(rows["score"].to_numpy(np.float32)),
                torch.tensor(rows["class"].map(index).to_numpy(np.int64)),
                torch.tensor(rows[["x1", "y1", "x2", "y2"]].to_numpy(np.float32)),
            )
            for number, rows in answer.groupby("image")
        }

    def is_cached(self) -> bool:
        return is_cached(loader_params(self.data, cached=True), self.root, "val")


def prepare_sample(root: Path, **options: Any) -> Prepared:
    (listing,) = SAMPLE.glob("*/*.dir")
    md5_of = {one["relpath"]: one["md5"] for one in json.loads(listing.read_bytes())}

    def read(path: str) -> bytes:
        return (SAMPLE / md5_of[path][:2] / md5_of[path][2:]).read_bytes()

    for split, count in (("train", 2), ("val", 10)):
        content = json.loads(read(f"annotations/instances_{split}.json"))
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        for number, image in enumerate(content["images"]):
            (path,) = [p for p in md5_of if p.endswith(f"/{image['file_name']}") and split in p]
            file = read(path)
            if split == "val" and number in ODD:
                with Image.open(io.BytesIO(file)) as opened:
                    file = ODD[number](opened.convert("RGB"))
            (root / "data" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "data" / path).write_bytes(file)
        (root / "data/annotations").mkdir(exist_ok=True)
        text = json.dumps(content)
        (root / f"data/annotations/instances_{split}.json").write_text(text)
    data = Data(path="data", short_sides=(96,), long_side=128, checks=CHECKS, **options)
    prepare(data, root, root / "prepared", 12)
    classes = read_classes(root / "prepared/classes.json")
    torch.manual_seed(0)
    detector = build_model(MODEL, len(classes)).eval()
    return Prepared(root, data, read_index(root / "prepared/val.safetensors"), classes, detector)


def with_truth(record: ImageRecord, found: Detections) -> ImageRecord:
    """The record with the best detections as its objects: against them, AP is no zero."""
    boxes = found.boxes_xyxy[:4].numpy().clip(0, [record.width, record.height] * 2)
    sides = boxes[:, 2:] - boxes[:, :2]
    return replace(
        record,
        boxes_xywh=tuple(map(tuple, np.hstack([boxes[:, :2], sides]).tolist())),
        labels=tuple(found.labels[:4].tolist()),
        areas=tuple(sides.prod(axis=1).tolist()),
        crowd=(False,) * len(boxes),
        annotation_ids=tuple(range(len(boxes))),
    )


@pytest.mark.parametrize("options", [{}, {"cache_gib": 0}], ids=["cached", "not cached"])
def test_the_served_model_detects_what_evaluate_detects(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    prepared = prepare_sample(tmp_path, **options)
    assert len(prepared.records) == 10
    assert any(record.rotate for record in prepared.records)
    evaluated = prepared.evaluated()
    assert prepared.is_cached() == (not options)
    served = prepared.served()
    assert evaluated.keys() == served.keys()
    for image_id, found in evaluated.items():
        same = served[image_id]
        # Evaluation's batches hold several images of one shape, which rounds otherwise.
        assert np.allclose(found.scores, same.scores, rtol=1e-5, atol=1e-6)
        best = slice(0, 4)
        assert np.array_equal(found.labels[best], same.labels[best])
        assert np.allclose(found.boxes_xyxy[best], same.boxes_xyxy[best], rtol=1e-4, atol=1e-3)

    records = [with_truth(record, evaluated[record.id]) for record in prepared.records]

    def ap(found: dict[int, Detections]) -> float:
        value = evaluate_detections(records, prepared.classes, found).summary["AP"]
        assert value is not None
        return value

    assert ap(evaluated) > 0.3
    assert round(ap(served), 3) == round(ap(evaluated), 3)


@pytest.mark.parametrize("options", [{}, {"cache_gib": 0}], ids=["cached", "not cached"])
def test_the_pixels_are_those_of_the_loader(tmp_path: Path, options: dict[str, Any]) -> None:
    prepared = prepare_sample(tmp_path, **options)
    loader = build_eval_loader(loader_params(prepared.data, batch_size=1, cached=True), tmp_path)
    batches = {batch.image_ids[0]: batch for batch in loader}
    preprocess = Preprocess(SIZES)
    for record in prepared.records:
        image = read_image(tmp_path / "data" / record.file)
        theirs = batches[record.id]
        assert np.array_equal(preprocess(image), theirs.images[0].numpy())
        assert theirs.original_sizes.tolist() == [list(image.shape[:2])]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_followed_as_a_viewer_does(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    with Image.open(io.BytesIO(stored)) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(read_image(image), shown)
    assert np.array_equal(read_image(stored), shown)
    assert shown.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))


NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
GREY = NOISE[:, :, 0]


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (NOISE, NOISE),
        (torch.from_numpy(NOISE).permute(2, 0, 1), NOISE),
        (torch.from_numpy(NOISE).permute(2, 0, 1) / 255, NOISE),
        ((torch.from_numpy(NOISE).permute(2, 0, 1) / 255).half(), NOISE),
        (NOISE / 255, NOISE),
        (GREY, np.dstack([GREY] * 3)),
        (GREY[:, :, None], np.dstack([GREY] * 3)),
        (torch.from_numpy(GREY)[None], np.dstack([GREY] * 3)),
        (GREY.astype(np.uint16) * 257, np.dstack([GREY] * 3)),
        (GREY > 127, np.dstack([(GREY > 127) * np.uint8(255)] * 3)),
        (np.dstack([NOISE, np.full((40, 60), 255, np.uint8)]), NOISE),
        (np.dstack([NOISE, np.zeros((40, 60), np.uint8)]), np.full_like(NOISE, 255)),
        (Image.fromarray(NOISE), NOISE),
        (encoded(Image.fromarray(NOISE), "PNG"), NOISE),
    ],
)
def test_every_kind_of_source_gives_the_same_pixels(source: Any, shown: np.ndarray) -> None:
    image = read_image(source)
    assert image.dtype == np.uint8
    assert np.array_equal(image, shown)


def test_wide_grey_arrays_are_scaled_as_files_are(tmp_path: Path) -> None:
    values = GREY.astype(np.uint16) * 16
    Image.fromarray(values).save(tmp_path / "a.png")
    wanted = read_image(tmp_path / "a.png", (0, 4095))
    assert wanted.max() > 250
    assert np.array_equal(read_image(values, (0, 4095)), wanted)


def no_pixels(folder: Path) -> Path:
    (folder / "a.jpg").write_text("hello")
    return folder / "a.jpg"


def cut_short(folder: Path) -> Path:
    (folder / "a.jpg").write_bytes(encoded(Image.fromarray(NOISE), "JPEG")[:-500])
    return folder / "a.jpg"


def floats(folder: Path) -> Path:
    Image.fromarray(GREY.astype(np.float32)).save(folder / "a.tif")
    return folder / "a.tif"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.jpg", "none.jpg: not found"),
        (no_pixels, "a.jpg: is no image of a known format; runkey reads JPEG, PNG, WEBP,"),
        (cut_short, "a.jpg: is cut short or damaged; runkey reads"),
        (floats, "a.tif: 32-bit pixels (mode F, values 0 to 255) of no known range; the model"),
        (lambda folder: folder, ": "),
        (lambda folder: b"", "image bytes: is empty"),
        (lambda folder: "https://x.org/a.jpg", "https://x.org/a.jpg: a URL; download it"),
        (lambda folder: NOISE.transpose(2, 0, 1), "array of shape (3, 40, 60): an array is [H, W]"),
        (lambda folder: torch.from_numpy(NOISE), "tensor of shape (40, 60, 3): an array is [H, W]"),
        (lambda folder: NOISE * 1.0, "floats from 0 to 255; scale them to 0..1"),
        (lambda folder: NOISE.astype(np.int64), "int64; give uint8"),
        (lambda folder: NOISE[:0], "array of shape (0, 60, 3): holds no pixel"),
        (lambda folder: 3, "int: no image; give a path, bytes"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_image(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("L", (3000, 2000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 3000x2000 is more than 5 megapixels"):
        read_image(tmp_path / "a.png", max_megapixels=5)
