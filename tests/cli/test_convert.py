"""`runkey convert`: YOLO and Pascal VOC as tools write them, with every fault that has a name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runkey.data.prepare import prepare
from runkey.params import Data
from tests.support.command_line import REPOSITORY, Run

INSTALLED = next(REPOSITORY.glob(".venv-convert/lib/python3*/site-packages/globox"), None)
pytestmark = pytest.mark.skipif(INSTALLED is None, reason="`make env-convert` installs globox")

BOX = "1 0.5 0.5 0.25 0.4\n"
"""Of class cube: [15, 9, 10, 12] in an image of 40 x 30 pixels."""
POLYGON = "0.0 0.1 0.2 0.5 0.2 0.3 0.6"
"""Of class ball, as some tools write it: [4, 6, 16, 12]."""
SUBSETS = {"train": "ab", "val": "c"}


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    """Write a tree of texts, and a picture of 40 x 30 pixels for each .png."""
    for number, (name, text) in enumerate(files.items()):
        path = root / "from" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png") and not text:
            Image.new("RGB", (40, 30), (number, 0, 0)).save(path)
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if not (root / ".venv-convert").exists():
        (root / ".venv-convert").symlink_to(REPOSITORY / ".venv-convert")
    return root / "to"


def yolo(images: str, labels: str, **more: str) -> dict[str, str | bytes]:
    """Two images of train, one of them without label, and one of val; {} is the split."""
    files: dict[str, str | bytes] = dict(more)
    for split, names in SUBSETS.items():
        files |= {f"{images.format(split)}/{name}.png": "" for name in names}
    files[f"{labels.format('train')}/a.txt"] = f"\ufeff{BOX}\r\n\r\n{POLYGON}\r\n"
    files[f"{labels.format('val')}/c.txt"] = BOX
    files[f"{images.format('train')}/._a.png"] = files["__MACOSX/a.txt"] = b"\0\5\x16"
    return files


def voc(name: str, *objects: str, size: str = "") -> str:
    text = f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"
    return f'<?xml version="1.0" encoding="ISO-8859-1"?>{text}'


def voc_object(name: str = "würfel", box: str = "15 9 25 21", more: str = "") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True)
    inside = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><bndbox>{inside}</bndbox>{more}</object>"


def boxes(to: Path, split: str) -> dict[str, list[Any]]:
    """Class name and box of the objects of each file."""
    coco = json.loads((to / f"annotations/instances_{split}.json").read_text())
    names = {one["id"]: one["name"] for one in coco["categories"]}
    found: dict[str, list[Any]] = {}
    for image in coco["images"]:
        assert (to / "images" / split / image["file_name"]).is_file()
        rows = [row for row in coco["annotations"] if row["image_id"] == image["id"]]
        found[image["file_name"]] = [
            (names[row["category_id"]], *map(round, row["bbox"])) for row in rows
        ]
    return found


ULTRALYTICS = (
    "path: /content/set\ntrain: /usr/images/train\nval: images/val\nnames: {0: ball, 1: cube}\n"
)
ROBOFLOW = "train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['ball', 'cube']\n"
LISTS = "train: ./parts/one.txt\nval: parts/two.txt\nnames: [ball, cube]\n"


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(
            yolo("images/{}", "labels/{}", **{"data.yaml": ULTRALYTICS}), id="Ultralytics"
        ),
        pytest.param(
            yolo(
                "{}/images", "{}/labels", **{"data.yaml": ROBOFLOW, "README.roboflow.txt": "1 b\n"}
            ),
            id="Roboflow",
        ),
        pytest.param(
            yolo(
                "obj_{}_data",
                "obj_{}_data",
                **{
                    "obj.names": "ball\ncube\n",
                    "obj.data": "classes = 2\n",
                    "train.txt": "data/obj_train_data/a.png\ndata/obj_train_data/b.png\n",
                    "val.txt": "data/obj_val_data/c.png",
                },
            ),
            id="Darknet, CVAT",
        ),
        pytest.param(
            yolo(
                "images",
                "labels",
                **{
                    "data.yaml": LISTS,
                    "parts/one.txt": "/home/me/images/a.png\n./images/b.png\n",
                    "parts/two.txt": "images\\c.png\n",
                },
            ),
            id="lists",
        ),
        pytest.param(
            yolo("images/{}", "labels/{}", **{"labels/train/classes.txt": "ball\ncube\n"}),
            id="labelImg",
        ),
    ],
)
def test_yolo(root: Path, run: Run, files: dict[str, str | bytes]) -> None:
    to = write(root, files)
    code, out, err = run("convert", "from", "to", "--format", "yolo")

    assert (code, err) == (0, "")
    assert boxes(to, "train") == {
        "a.png": [("cube", 15, 9, 10, 12), ("ball", 4, 6, 16, 12)],
        "b.png": [],
    }
    assert boxes(to, "val") == {"c.png": [("cube", 15, 9, 10, 12)]}
    assert out.splitlines() == [
        "yolo         3 images, 3 objects, 2 classes",
        "COCO, train  2 images, 2 objects, 2 classes",
        "COCO, val    1 image, 1 object, 2 classes",
        "to/ is written: move it to data/, then `dvc add data`",
    ]


def test_yolo_without_splits_is_one_json_that_prepare_splits(root: Path, run: Run) -> None:
    """Label Studio's and FiftyOne's; a.png is in two folders, and so are its labels."""
    files = yolo("images", "labels", **{"classes.txt": "ball\ncube"})
    files |= {"images/sub/a.png": "", "labels/sub/a.txt": BOX}
    to = write(root, files)
    assert run("convert", "from", "to", "--format", "yolo")[0] == 0

    found = boxes(to, "all")
    assert [len(found[name]) for name in ("a.png", "b.png", "c.png", "sub/a.png")] == [2, 0, 1, 1]
    kept = prepare(Data(path="to", val_fraction=0.3), root, root / "prepared", 10).kept
    assert sum(split["objects"] for split in kept.values()) == 4


def test_an_image_called_test_and_one_in_both_lists(root: Path, run: Run) -> None:
    files: dict[str, str | bytes] = {"classes.txt": "ball\ncube", "test.png": "", "test.txt": BOX}
    files |= {"a.png": "", "a.txt": BOX, "train.txt": "a.png\ntest.png", "valid.txt": "test.png\n"}
    to = write(root, files)
    code, out, _ = run("convert", "from", "to", "--format", "yolo")
    assert code == 0
    assert boxes(to, "val") == {"test.png": [("cube", 15, 9, 10, 12)]}
    assert len(boxes(to, "train")) == 2
    assert "left out" not in out


def test_keypoints_are_no_polygon(root: Path, run: Run) -> None:
    names = "kpt_shape: [2, 3]\nnames: [ball, cube]"
    label = f"{BOX.strip()} 0.1 0.1 2 0.9 0.9 2"
    to = write(root, {"data.yaml": names, "a.png": "", "a.txt": label})
    assert run("convert", "from", "to", "--format", "yolo")[0] == 0
    assert boxes(to, "all") == {"a.png": [("cube", 15, 9, 10, 12)]}


PART = "<part><name>hand</name><bndbox><xmin>1</xmin></bndbox></part>"


def test_pascal_voc(root: Path, run: Run) -> None:
    """The devkit's folders; lists of other tasks, lists by class and parts of objects."""
    hard = voc_object("ball", "4.0 6.0 20.0 18.0", "<difficult>1</difficult>" + PART)
    files: dict[str, str | bytes] = {f"JPEGImages/{name}.png": "" for name in "abcd"}
    files |= {
        "Annotations/a.xml": voc("a.png", voc_object(), hard).encode("latin-1"),
        "Annotations/b.xml": voc("b.png"),
        "Annotations/c.xml": voc("c.jpg", voc_object()).encode("latin-1"),
        "ImageSets/Main/train.txt": "a\nb\n",
        "ImageSets/Main/val.txt": "c\n",
        "ImageSets/Main/ball_train.txt": "a  1\nb -1\n",
        "ImageSets/Main/trainval.txt": "a\nb\nc\n",
        "ImageSets/Segmentation/val.txt": "a\n",
    }
    to = write(root, files)
    code, out, _ = run("convert", "from", "to", "--format", "voc")

    assert code == 0
    cube = ("würfel", 15, 9, 10, 12)
    assert boxes(to, "train") == {"a.png": [cube, ("ball", 4, 6, 16, 12)], "b.png": []}
    assert boxes(to, "val") == {"c.png": [cube]}
    assert out.splitlines()[3:-1] == [
        "note: objects marked as difficult, now like others: 1, such as a.xml",
        "note: images in no split, left out: 1, such as d.png",
        "note: left out: 1 image",
    ]


@pytest.mark.parametrize("labels", ["{}", "{}/labels", "annotations/{}"])
def test_voc_files_of_one_name_in_several_folders(root: Path, run: Run, labels: str) -> None:
    """Roboflow's (beside the images), and trees that mirror each other; test stays test."""
    files: dict[str, str | bytes] = {}
    for split, box in (("train", "0 0 5 5"), ("test", "1 1 7 7")):
        files[f"{split}/a.png"] = ""
        files[f"{labels.format(split)}/a.xml"] = voc("a.png", voc_object("ball", box))
    to = write(root, files)
    assert run("convert", "from", "to", "--format", "voc")[0] == 0
    assert boxes(to, "train") == {"a.png": [("ball", 0, 0, 5, 5)]}
    assert boxes(to, "test") == {"a.png": [("ball", 1, 1, 6, 6)]}


def test_a_label_is_never_taken_for_one_of_another_folder(root: Path, run: Run) -> None:
    """The images of labels/cam1/1.txt and of labels/train/2.txt are missing."""
    files: dict[str, str | bytes] = {"classes.txt": "ball\ncube", "labels/cam1/1.txt": BOX}
    files |= {"images/cam2/1.png": "", "images/cam3/1.png": "", "images/val/2.png": ""}
    files |= {"labels/train/2.txt": BOX}
    write(root, files)
    _, _, err = run("convert", "from", "to", "--format", "yolo")
    assert err.splitlines()[:2] == [
        "  labels/cam1/1.txt: has no image",
        "  labels/train/2.txt: has no image",
    ]


def test_what_prepare_judges_is_kept_and_named(root: Path, run: Run) -> None:
    size = "<size><width>80</width><height>60</height></size>"
    over = voc("a.png", voc_object("ball", "70 1 95 9"), size=size)
    to = write(root, {"a.png": "", "a.xml": over})
    code, out, _ = run("convert", "from", "to", "--format", "voc")
    assert code == 0
    assert boxes(to, "all") == {"a.png": [("ball", 70, 1, 25, 8)]}
    assert "labels of another size than their image's: 1, such as a.xml: 80x60, 40x30" in out
    assert "boxes that reach over their image, which `prepare` checks: 1, such as a.xml" in out


SOUND = {"data.yaml": "names: [ball, cube]", "b.png": "", "b.txt": BOX}
TREE = {"b.png": "", "b.xml": voc("b.png", voc_object("ball"))}


@pytest.mark.parametrize("name", ["a.txt", "train.txt", "classes.txt"])
def test_an_endless_file_is_not_read(root: Path, run: Run, name: str) -> None:
    files = {"classes.txt": "ball\ncube\n", "a.png": "", "b.png": "", "b.txt": BOX}
    to = write(root, files)
    with (root / "from" / name).open("ab") as file:
        file.write(b"\n")
        file.truncate(64 << 30)
    code, _, err = run("convert", "from", "to", "--format", "yolo")
    assert code == 1
    assert f"{name}: " in err
    assert "larger than 16" in err
    assert not to.exists()


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"a.txt": BOX + "7 0.5 0.5 0.1 0.1"},
            "a.txt: line 2: class 7, but the names are of 0 to 1",
        ),
        ({"a.txt": "1.5 0.5 0.5 0.1 0.1"}, "a.txt: line 1: class 1.5, but the names"),
        ({"a.txt": "1 0.5 0.5 0.1"}, "a.txt: line 1: Syntax error"),
        ({"a.txt": "1 0.5 0.5 0.1 0.1 0.2 0.3 0.4"}, "a.txt: line 1: Syntax error"),
        ({"a.txt": "1 0.5 x 0.1 0.1"}, "a.txt: line 1: Syntax error"),
        ({"a.txt": "1 0.5 0.5 -0.1 0.1"}, "a.txt: line 1: `xmax` must be greater"),
        ({"a.txt": "1 inf 0.5 0.1 0.1"}, "a.txt: line 1: box [inf, "),
        ({"a.txt": "1 nan 0.5 0.1 0.1"}, "a.txt: line 1: `xmax` must be greater"),
        ({"a.txt": b"1 0.5 \xff 0.1 0.1"}, "a.txt: cannot be read ('utf-8' codec"),
        ({"labels/gone.txt": BOX}, "labels/gone.txt: has no image"),
        ({"a.txt": BOX, "a.bmp": b"no picture"}, "a.bmp: is no image that can be read"),
        ({"labels/a.txt": BOX, "more/a.txt": BOX}, "more/a.txt: a.png has another label, a.txt"),
        ({"a.xml": "<annotation><object>"}, "a.xml: cannot be read (no element found"),
        (
            {"a.xml": "<?xml version='1.0' encoding='nonsense'?><annotation/>"},
            "a.xml: cannot be read (unknown encoding",
        ),
        ({"a.xml": "<annotations/>"}, "a.xml: cannot be read (<annotations> in place of"),
        ({"a.xml": voc("a.png", voc_object(" "))}, "a.xml: object 1: no name"),
        (
            {"a.xml": voc("a.png", "<object><name>x</name></object>")},
            "a.xml: object 1: Syntax error in imagenet",
        ),
        ({"a.xml": voc("a.png", voc_object("x", "1 1 x 9"))}, "a.xml: object 1: Syntax error"),
        ({"a.xml": voc("a.png", voc_object("x", "9 1 1 9"))}, "a.xml: object 1: `xmax` must be"),
        ({"gone.xml": voc("gone.jpg", voc_object("x"))}, "gone.xml: has no image"),
    ],
)
def test_what_cannot_be_read_is_named_and_left_out_if_asked(
    root: Path, run: Run, files: dict[str, str | bytes], line: str
) -> None:
    kind = "voc" if any(name.endswith(".xml") for name in files) else "yolo"
    to = write(root, (TREE if kind == "voc" else SOUND) | {"a.png": ""} | files)

    code, out, err = run("convert", "from", "to", "--format", kind)
    assert (code, out) == (1, "")
    assert err.startswith(f"  {line}")
    assert err.splitlines()[-1] == (
        "error: from: nothing is written; mend what is named above (1), or leave it out with --drop"
    )
    assert not to.exists()
    assert not list(root.glob(".to*"))

    code, out, _ = run("convert", "from", "to", "--format", kind, "--drop")
    assert code == 0
    assert boxes(to, "all")["b.png"] != []
    before, after = (one.split() for one in out.splitlines()[:2])
    lost = int(before[3]) - int(after[4])
    assert ("left out: " in out) == (lost > 0 or before[1] != after[2])


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "from: one data.yaml or classes.txt is wanted; none is there"),
        (
            {"classes.txt": "ball", "obj.names": "cube"},
            "from: one data.yaml or classes.txt is wanted; classes.txt, obj.names",
        ),
        ({"data.yaml": "names: [ball, ball]"}, "from/data.yaml: class 'ball' twice in `names`"),
        (
            {"data.yaml": "names: {a: ball}"},
            "from/data.yaml: index 'a', no whole number in `names`",
        ),
        ({"data.yaml": "names: [ball"}, "from/data.yaml: cannot be read ("),
        ({"data.yaml": "names: " + "[" * 500}, "from/data.yaml: cannot be read ("),
    ],
)
def test_class_names_that_cannot_be_told(
    root: Path, run: Run, files: dict[str, str | bytes], line: str
) -> None:
    write(root, {"a.png": "", "a.txt": "0 0.5 0.5 0.1 0.1", **files})
    code, _, err = run("convert", "from", "to", "--format", "yolo")
    assert code == 1
    assert err.startswith(f"error: {line}")


def test_without_globox_or_with_a_folder_in_the_way(
    root: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, dict(SOUND))
    monkeypatch.setitem(sys.modules, "globox", None)  # as if it were not installed
    line = "error: `runkey convert` needs globox, which is not installed; run `make env-convert`\n"
    assert run("convert", "from", "to", "--format", "yolo") == (1, "", line)
    line = "error: from: is there already; name a new folder\n"
    assert run("convert", "from", "from", "--format", "yolo") == (1, "", line)
    assert run("convert", "gone", "to", "--format", "voc")[2] == "error: gone: no such folder\n"
