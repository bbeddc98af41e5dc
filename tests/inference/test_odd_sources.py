"""Odd files among the sources of predict: no output overwrites another, and nothing stops it."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from runkey.errors import DataError
from runkey.inference.model import InferenceCard, Model, load_model_folder
from runkey.inference.networks import TorchNetwork
from runkey.inference.predict import Options, find_sources, predict
from runkey.inference.writers import held_folder
from runkey.model.weights import CardClass
from tests.inference.test_hostile_models import BOXES, LABELS, SCORES, Constant
from tests.support.exportable import SIZES
from tests.support.small_model import film, has_av, photograph

ALL = ("json", "csv", "yolo", "voc", "labelme", "cvat", "images", "sheet")
needs_av = pytest.mark.skipif(not has_av(), reason="`make env-export` installs PyAV")


def model_of(*names: str) -> Model:
    """It answers two boxes of the first two classes to each image."""
    classes = tuple(CardClass(index, index + 3, name) for index, name in enumerate(names))
    return Model(InferenceCard(classes, SIZES), TorchNetwork(Constant(SCORES, LABELS, BOXES)))


def written(folder: Path, *sources: Path, model: Model | None = None, **changes):
    found = find_sources(map(str, sources), out=folder)
    options = Options(kinds=ALL, batch_size=1, score=0.1, **changes)
    return predict(model or model_of("ball", "cube"), found, folder, options), found


@pytest.mark.parametrize(
    "names",
    [
        ("a.jpg", "a.png", "a.jpg.png"),
        ("a.jpg", "a.png", "a.jpg.jpg", "a.jpg.jpg.jpg", "a_2.jpg"),
        ("x/a.jpg", "y/a.jpg", "x/a.jpg.jpg", "x/a.png"),
        ("a.png", "a.jpg/b.png", "a.txt/b.png", "a.json/c.png", "a.xml/d.png"),
        ("a" * 246 + ".jpg", "a" * 246 + ".png", "a" * 251 + ".jpg", "b" * 251 + ".png"),
        ("é" * 125 + ".jpg", "é" * 124 + "e.jpg", "\U0001f600.jpg", "a\u202fb.jpg", " .jpg"),
        ("..jpg.png", "a..png", "a .png", "~.png", "a~1.png", "CON.png", "=1+1.png"),
    ],
)
def test_each_image_has_outputs_of_its_own(names, tmp_path):
    for number, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path, "PNG")
    visible = [name for name in names if not name.startswith(".")]
    summary, found = written(tmp_path / "out", tmp_path / "in")
    assert summary.images == len(found.sources) == len(visible)
    assert sorted(one.name for one in found.sources) == sorted(visible)
    for kind, suffix in (("images", "jpg"), ("yolo/labels", "txt"), ("voc", "xml")):
        files = [path for path in (tmp_path / "out" / kind).rglob(f"*.{suffix}") if path.is_file()]
        assert len(files) == len(visible), kind
    pointed = Counter(
        (path.parent / json.loads(path.read_text())["imagePath"]).resolve()
        for path in (tmp_path / "out" / "labelme").rglob("*.json")
        if path.is_file()
    )
    assert pointed == Counter((tmp_path / "in" / name).resolve() for name in visible)


@needs_av
def test_a_film_and_an_image_that_is_named_like_its_frame(tmp_path):
    for folder in ("in", "in/film_frame_000002"):
        (tmp_path / folder).mkdir()
    film(tmp_path / "in" / "film.mp4", 3)
    film(tmp_path / "in" / ("f" * 250 + ".mp4"), 2)
    photograph(1).save(tmp_path / "in" / "film_frame_000001.jpg")
    photograph(2).save(tmp_path / "in" / "film_frame_000001.png")
    photograph(3).save(tmp_path / "in" / "film_frame_000002" / "a.png")
    summary, _ = written(tmp_path / "out", tmp_path / "in")
    assert summary.images == 8
    assert len([p for p in (tmp_path / "out" / "images").rglob("*.jpg") if p.is_file()]) == 8
    assert len(list((tmp_path / "out" / "frames").iterdir())) == 5
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert len({one["file_name"] for one in entries}) == 8


def test_an_address_has_no_name_of_a_file(tmp_path):
    photograph(1).save(tmp_path / "a.jpg")
    arguments = ["http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/b/a.jpg", str(tmp_path / "a.jpg")]
    for ordered in (arguments, arguments[::-1]):
        found = find_sources(ordered, allow_urls=True)
        assert sorted(one.name for one in found.sources) == ["a.jpg", "a_2.jpg", "a_3.jpg"]
        assert next(one.name for one in found.sources if not one.is_address) == "a.jpg"


def bomb(path: Path, width: int, height: int) -> None:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(10_000))))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


def test_pipes_devices_loops_and_bombs_are_skipped_by_name(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    photograph(1).save(folder / "good.png")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "loops").symlink_to(folder)
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "empty.png").touch()
    bomb(folder / "bomb.png", 50_000, 50_000)
    bomb(folder / "long.png", 2**31 - 1, 1)
    (folder / "new\nline.png").write_bytes(b"x")
    summary, _ = written(tmp_path / "out", folder)
    assert summary.images == 1
    reasons = {one.name: one.reason for one in summary.skipped}
    assert "50000x50000 is more than 500 megapixels" in reasons["bomb.png"]
    assert "not a file" in reasons["pipe.png"]
    odd = "pipe.png pipe.mp4 zero.png zero.mp4 loop.png gone.png empty.png bomb.png long.png"
    assert sorted(reasons) == sorted([*odd.split(), "new\\nline.png"])


def test_a_folder_without_the_right_to_read_it_is_named(tmp_path):
    (tmp_path / "in" / "shut").mkdir(parents=True)
    photograph(1).save(tmp_path / "in" / "a.png")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "in" / "shut").chmod(0)
    script = (
        "import os\n"
        "from runkey.inference.sources import find_sources\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        f"found = find_sources([{str(tmp_path / 'in')!r}])\n"
        "print(len(found.sources), found.skipped[0].name, found.skipped[0].reason)\n"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, env=here, check=False)
    (tmp_path / "in" / "shut").chmod(0o700)
    assert done.stdout.startswith(f"1 {tmp_path}/in/shut a folder that cannot be read (Permission")


def odd_images(folder: Path) -> list[str]:
    """Images of every kind that a folder may hold; all can be read."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    made = {
        "one.png": Image.new("RGB", (1, 1)),
        "tall.png": Image.new("RGB", (1, 30_000)),
        "wide.png": Image.new("RGB", (30_000, 1)),
        "grey_alpha.png": rgb.convert("LA"),
        "palette.png": rgb.quantize(8),
        "bits.png": rgb.convert("1"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "sixteen.png": Image.fromarray(rng.integers(0, 2**16, (40, 60), np.uint16)),
    }
    folder.mkdir()
    for name, image in made.items():
        options = {"transparency": 0} if name == "palette.png" else {}
        image.save(folder / name, **options)
    frames = [rgb, rgb.rotate(90)]
    for name in ("moving.gif", "moving.webp", "moving.png", "pages.tif"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    return [*made, "moving.gif", "moving.webp", "moving.png", "pages.tif"]


def test_every_kind_of_image_is_predicted_on(tmp_path, small_model_folder):
    names = odd_images(tmp_path / "in")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "in" / "float.tif")
    found = find_sources([str(tmp_path / "in")])
    summary = predict(
        load_model_folder(small_model_folder, "cpu"), found, tmp_path / "out", Options(kinds=ALL)
    )
    assert [one.name for one in summary.skipped] == ["float.tif"]
    assert summary.images == len(names)
    assert sorted(summary.first_of_several) == [
        "moving.gif",
        "moving.png",
        "moving.webp",
        "pages.tif",
    ]
    coco = json.loads((tmp_path / "out" / "predictions.json").read_text())
    sizes = {one["file_name"]: (one["width"], one["height"]) for one in coco["images"]}
    assert sizes["tall.png"] == (1, 30_000)
    for row in coco["annotations"]:
        assert np.isfinite(row["bbox"]).all()


NAMES = (
    'a"\n- b: \\',
    "</name><x>&amp;\x01\x1b[2J",
    "../../up",
    "\u2028\x85\x7f",
    "=cmd|' /C x'!A0",
)


def test_class_names_break_no_format(tmp_path):
    photograph(1).save(tmp_path / "a <&\"'.png")
    inner = tmp_path / "in" / "here"
    inner.mkdir(parents=True)
    for first in range(len(NAMES)):
        names = NAMES[first:] + NAMES[:first]
        out = inner / f"out{first}"
        written(out, tmp_path / "a <&\"'.png", model=model_of(*names))
        assert list(yaml.safe_load((out / "yolo/data.yaml").read_text())["names"].values()) == [
            *names
        ]
        assert len((out / "yolo/classes.txt").read_text().splitlines()) == len(names)
        plain = [name.replace("\x01", "").replace("\x1b", "") for name in names[:2]]
        voc = ElementTree.parse(next((out / "voc").iterdir())).getroot()
        assert [one.findtext("name") for one in voc.iter("object")] == plain
        assert voc.findtext("filename") == "a <&\"'.png"
        cvat = ElementTree.parse(out / "cvat.xml").getroot()
        assert [one.get("label") for one in cvat.iter("box")] == plain
        with (out / "predictions.csv").open(newline="") as file:
            assert [row["class"] for row in csv.DictReader(file)] == list(names[:2])
        coco = json.loads((out / "predictions.json").read_text())
        assert [one["name"] for one in coco["categories"]] == list(names)
        assert not list(tmp_path.rglob("up*"))


def test_classes_of_one_name_have_each_its_own_score(tmp_path):
    photograph(1).save(tmp_path / "a.png")
    summary, _ = written(tmp_path / "out", tmp_path / "a.png", model=model_of("ball", "ball"))
    assert summary.objects == {"ball": 2}
    model = model_of("ball", "ball")
    assert len(model(tmp_path / "a.png", "auto")) == 2


def test_a_path_that_is_not_utf8(tmp_path, small_model_folder):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    photograph(1).save(os.fsencode(folder / "a.png"))
    photograph(1).save(os.fsencode(folder) + b"/\xff.png", "PNG")
    line = [sys.executable, "-m", "runkey", "predict", str(small_model_folder)]
    line += [os.fsencode(folder), "--out", str(tmp_path / "out"), "--write", ",".join(ALL)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    assert "\\udcff.png" in (tmp_path / "out" / "skipped.csv").read_text()
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]


def test_two_predicts_do_not_share_a_folder(tmp_path):
    photograph(1).save(tmp_path / "a.png")
    with (
        held_folder(tmp_path / "out"),
        pytest.raises(DataError, match="another `runkey predict` writes there now"),
    ):
        written(tmp_path / "out", tmp_path / "a.png")
    assert written(tmp_path / "out", tmp_path / "a.png")[0].images == 1
    assert written(tmp_path / "out", tmp_path / "a.png")[0].was_there


@pytest.mark.parametrize("link", ["images", "yolo", "yolo/labels", "voc", "labelme"])
def test_a_link_in_the_folder_leads_nothing_outside(link, tmp_path):
    photograph(1).save(tmp_path / "a.png")
    written(tmp_path / "out", tmp_path / "a.png")
    (tmp_path / "outside").mkdir()
    place = tmp_path / "out" / link
    place.rename(tmp_path / "out" / "old")
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"a link to .*/outside; remove it"):
        written(tmp_path / "out", tmp_path / "a.png")
    assert not list((tmp_path / "outside").iterdir())


@needs_av
@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:1,\n{0}\n", "ffconcat version 1.0\nfile {0}\n", "{0}"]
)
def test_a_video_that_names_another_file_is_none(text, tmp_path):
    film(tmp_path / "real.mp4", 2)
    (tmp_path / "list.mp4").write_text(text.format(tmp_path / "real.mp4"))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "real.mp4").read_bytes()[:600])
    photograph(1).save(tmp_path / "a.png")
    summary, _ = written(
        tmp_path / "out", *(tmp_path / name for name in ("a.png", "list.mp4", "cut.mp4"))
    )
    assert summary.images == 1
    assert {one.name for one in summary.skipped} == {"list.mp4", "cut.mp4"}
