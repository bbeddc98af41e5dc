"""`runkey debug-images`: augmented training images with their boxes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from runkey.data.index import ClassName, write_classes, write_index
from runkey.inference.draw import class_colour
from tests.support.workspace import _record

RED, GREY = (250, 0, 0), (124, 116, 104)


@pytest.fixture
def prepared(root):
    """A checkout with twelve red images, each with one box, and zoom-out in every image."""
    records = [_record(i, (60, 80)) for i in range(12)]
    (root / "prepared").mkdir()
    write_index(root / "prepared/train.safetensors", records)
    write_classes(root / "prepared/classes.json", [ClassName(i, i, f"ball {i}") for i in range(3)])
    for record in records:
        path = root / "data" / record.file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), RED).save(path)
    return root


def with_augment(root, **values):
    text = (root / "params.yaml").read_text()
    for name, value in values.items():
        line = next(line for line in text.splitlines() if line.startswith(f"    {name}: "))
        text = text.replace(line, f"    {name}: {value}")
    (root / "params.yaml").write_text(text)


def share(path, colour) -> float:
    """The part of a picture that has about that colour; JPEG blurs."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(axis=2) < 24).mean())


def test_it_shows_what_the_model_sees(prepared, run):
    with_augment(prepared, brightness=0.0, contrast=0.0, zoom=0.0, shift=0.0, aspect=0.0)
    code, out, _ = run("debug-images")
    assert code == 0
    assert out.endswith("with their boxes: training-images.jpg\n")
    red = share("training-images.jpg", RED)
    assert red > 0.3
    assert share("training-images.jpg", GREY) < 0.01
    blue = tuple(int(class_colour(0)[i : i + 2], 16) for i in (1, 3, 5))
    assert share("training-images.jpg", blue) > 0.002

    with_augment(prepared, zoom_out_probability=1.0)
    code, out, _ = run("debug-images", "--epoch", "2", "--out", "smaller.jpg", "--json")
    assert json.loads(out) == {"epoch": 2, "picture": "smaller.jpg"}
    assert share("smaller.jpg", RED) < 0.6 * red
    assert share("smaller.jpg", GREY) > 0.1

    with_augment(prepared, brightness=1.0)
    run("debug-images", "--out", "bright.jpg")
    assert share("bright.jpg", RED) < 0.8 * share("smaller.jpg", RED)


def test_it_needs_prepared_data(root, run):
    code, out, errors = run("debug-images")
    assert (code, out) == (1, "")
    assert "classes.json: not found; run `dvc repro prepare` first" in errors
    assert not (root / "training-images.jpg").exists()
