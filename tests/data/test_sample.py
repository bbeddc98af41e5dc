"""The numbered balls: the same bytes every time, sound boxes, no digit in two splits."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from runkey.errors import DataError
from tests.support.sample import load_maker

ROOT = Path(__file__).resolve().parents[2]
sample = load_maker()
COUNTS, NUMBERS, WIDTH, HEIGHT = sample.COUNTS, sample.NUMBERS, sample.WIDTH, sample.HEIGHT
Ball, coverage, digit_ink = sample.Ball, sample.coverage, sample.digit_ink
draw_picture, load_sources = sample.draw_picture, sample.load_sources
make_picture, make_sample = sample.make_picture, sample.make_sample
FIRST = "83b72bbe1b6cd1d63babc388fcee552606a6e1a1c9ad7290ed1981e4421ce610"


@pytest.fixture(scope="module")
def sources():
    return load_sources()


@pytest.fixture(scope="module")
def annotations(remade):
    folder, _ = remade
    return {
        split: json.loads((folder / f"annotations/instances_{split}.json").read_text())
        for split in COUNTS
    }


def dvc_directory_md5(folder: Path) -> str:
    """DVC's md5 of a folder: of the JSON list of its files' md5s and names, sorted by name."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    entries = [
        {"md5": hashlib.md5((folder / name).read_bytes()).hexdigest(), "relpath": name}
        for name in files
    ]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def test_remake_is_what_the_repository_ships(remade):
    """Against sample-data/, not data.dvc alone: that may name somebody's own images by now."""
    folder, _ = remade
    made = dvc_directory_md5(folder)
    assert (ROOT / "sample-data/files/md5" / made[:2] / made[2:]).is_file()
    out = YAML(typ="safe", pure=True).load((ROOT / "data.dvc").read_text())["outs"][0]
    if out.get("remote") == "seed" and sample_is_current(out["md5"]):
        assert out["md5"] == made
        assert out["nfiles"] == 604


def sample_is_current(md5: str) -> bool:
    return (ROOT / "sample-data/files/md5" / md5[:2] / md5[2:]).is_file()


def test_shipped_objects_are_named_by_their_content():
    """What git carries is unchanged (no end-of-line conversion, no lost file), within 6 MB."""
    objects = [p for p in (ROOT / "sample-data/files/md5").rglob("*") if p.is_file()]
    for path in objects:
        named = (path.parent.name + path.name).removesuffix(".dir")
        assert hashlib.md5(path.read_bytes()).hexdigest() == named
    assert len(objects) == 605
    assert sum(path.stat().st_size for path in objects) <= 6_000_000


def test_counts_and_size(remade, annotations):
    folder, made = remade
    assert {split: len(list((folder / split).glob("*.jpg"))) for split in COUNTS} == COUNTS
    assert {split: len(tree["images"]) for split, tree in annotations.items()} == COUNTS
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 6_000_000
    assert {s: images for s, (images, _) in made.items()} == {"train": 400, "val": 100, "test": 100}
    for split, tree in annotations.items():
        for image in tree["images"]:
            with Image.open(folder / split / image["file_name"]) as opened:
                assert opened.format == "JPEG"
                assert opened.size == (image["width"], image["height"]) == (WIDTH, HEIGHT)


def test_authors_and_licences_are_stated(remade, annotations):
    folder, _ = remade
    text = (folder / "LICENSE.txt").read_text()
    authors = ("Alpaydin", "Kaynak", "danielbuechele", "vultilion", "James S. Davis")
    for name in (*authors, "CC BY 2.0", "CC BY 4.0", "public domain"):
        assert name in text
    for tree in annotations.values():
        assert {image["license"] for image in tree["images"]} == {tree["licenses"][0]["id"]}
        assert "Alpaydin" in tree["info"]["contributor"]


def test_coco_ids_are_sound(annotations):
    image_ids = [image["id"] for tree in annotations.values() for image in tree["images"]]
    box_ids = [box["id"] for tree in annotations.values() for box in tree["annotations"]]
    assert len(set(image_ids)) == len(image_ids)
    assert len(set(box_ids)) == len(box_ids)
    for tree in annotations.values():
        assert [c["name"] for c in tree["categories"]] == list(NUMBERS)
        known = {image["id"] for image in tree["images"]}
        assert {box["image_id"] for box in tree["annotations"]} <= known


def test_boxes_lie_inside_and_overlap_little(annotations):
    for tree in annotations.values():
        per_image: dict[int, list[list[int]]] = {}
        for box in tree["annotations"]:
            left, top, width, height = box["bbox"]
            assert left >= 0
            assert top >= 0
            assert left + width <= WIDTH
            assert top + height <= HEIGHT
            assert width == height
            assert sample.SMALLEST <= width <= sample.LARGEST
            assert box["area"] == width * height
            per_image.setdefault(box["image_id"], []).append(box["bbox"])
        for boxes in per_image.values():
            assert len(boxes) <= 8
            for a, b in combinations(boxes, 2):
                wide = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
                high = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
                assert wide * high <= 0.35 * min(a[2] * a[3], b[2] * b[3])


def test_every_size_and_number_is_there(annotations):
    areas = [box["area"] for tree in annotations.values() for box in tree["annotations"]]
    parts = Counter("S" if a < 32**2 else "M" if a < 96**2 else "L" for a in areas)
    assert 2400 <= len(areas) <= 3000
    assert parts["S"] / len(areas) == pytest.approx(0.46, abs=0.05)
    assert parts["M"] / len(areas) == pytest.approx(0.48, abs=0.05)
    assert parts["L"] / len(areas) == pytest.approx(0.056, abs=0.02)
    for split, least in (("train", 180), ("val", 40), ("test", 40)):
        count = Counter(box["category_id"] for box in annotations[split]["annotations"])
        assert set(count) == set(range(1, 9))
        assert min(count.values()) >= least


def test_test_shows_no_digit_and_no_photograph_of_train_or_val(sources):
    shown = {
        split: {
            ball.digit
            for index in range(COUNTS[split])
            for ball in sample.layout(sources, split, index)[1]
        }
        for split in COUNTS
    }
    assert not shown["test"] & (shown["train"] | shown["val"])
    assert min(map(len, sources.rows["test"])) >= 20
    for photo in sources.photos["test"]:
        assert photo.shape[2] == 3
        assert not any(
            np.array_equal(photo[:9, :9], other[:9, :9])
            for s in ("train", "val")
            for other in sources.photos[s]
        )


def test_train_and_val_are_the_bytes_that_they_were(remade):
    """Those of the first 500 images, before there was test."""
    folder, _ = remade
    names = sorted(p for s in ("train", "val") for p in (folder / s).iterdir())
    names += [folder / f"annotations/instances_{s}.json" for s in ("train", "val")]
    digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in names))
    assert digest.hexdigest() == FIRST


def test_no_digit_is_in_train_and_val(sources):
    train = {int(row) for rows in sources.rows["train"] for row in rows}
    val = {int(row) for rows in sources.rows["val"] for row in rows}
    assert not train & val
    assert len(val) / (len(train) + len(val)) == pytest.approx(0.2, abs=0.005)
    shown = {split: set() for split in COUNTS}
    for split in ("train", "val"):
        for index in range(12):
            _, balls = make_picture(sources, split, index)
            shown[split] |= {ball.digit for ball in balls}
    assert shown["train"] <= train
    assert shown["val"] <= val


def test_photographs_are_divided(sources):
    for train, val in zip(sources.photos["train"], sources.photos["val"], strict=True):
        assert train.shape[1] + val.shape[1] == 640
        assert train.shape[1] == 416


def test_a_picture_does_not_depend_on_the_others(remade, sources):
    """Number 37 alone, in another process's order, is file 37."""
    folder, _ = remade
    pixels, balls = make_picture(sources, "val", 37)
    again, _ = make_picture(sources, "val", 37)
    assert (pixels == again).all()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=72, optimize=True)
    assert buffer.getvalue() == (folder / "val/001038.jpg").read_bytes()
    other, _ = make_picture(sources, "train", 37)
    assert not (pixels == other).all()
    assert balls


@pytest.mark.parametrize("diameter", [14, 15, 40, 77, 120])
def test_the_box_is_the_balls_exact_extent(sources, diameter):
    """Seen in the finished picture: every edge row and column of the box is touched."""
    ball = Ball(60, 30, diameter, 3, (206.0, 40.0, 40.0), int(sources.rows["train"][2][0]), 10)
    visible = coverage(ball) > 0.05
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    assert (rows[0], rows[-1]) == (columns[0], columns[-1]) == (0, diameter - 1)
    # On white, what is not ball stays grey (white or shadow); the red rim is not.
    white = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    picture = draw_picture(white, [ball], sources.digits_8x8, np.zeros((HEIGHT, WIDTH, 3))).astype(
        int
    )
    red = np.ptp(picture, axis=2) > 6
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    left, top, width, height = ball.box_xywh
    assert (columns[0], columns[-1]) == (left, left + width - 1)
    assert (rows[0], rows[-1]) == (top, top + height - 1)


def test_later_balls_cover_earlier_ones(sources):
    white = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    still = np.zeros((HEIGHT, WIDTH, 3))
    below = Ball(50, 50, 60, 1, (0.0, 0.0, 255.0), 0, 0)
    above = Ball(70, 50, 60, 1, (0.0, 255.0, 0.0), 0, 0)
    y, x = 102, 90  # in the rim of both
    assert draw_picture(white, [below, above], sources.digits_8x8, still)[y, x].argmax() == 1
    assert draw_picture(white, [above, below], sources.digits_8x8, still)[y, x].argmax() == 2


def test_ink_follows_the_digit(sources):
    digit = sources.digits_8x8[0]
    ink = digit_ink(digit, 0, 60)
    assert ink.shape == (60, 60)
    assert 0 <= ink.min() < ink.max() <= 1
    # Strokes lie where the 8 x 8 image has them (its border of one cell is the margin).
    coarse = ink.reshape(10, 6, 10, 6).mean(axis=(1, 3))[1:-1, 1:-1]
    assert np.corrcoef(coarse.ravel(), digit.ravel())[0, 1] > 0.9
    assert not np.allclose(ink, digit_ink(digit, 15, 60))


def test_a_strange_folder_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(DataError) as caught:
        make_sample(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds holiday.jpg, no sample data; name a new or an empty folder"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]
