"""Every kind of bad data set, and the one line that a user reads about it.

Each case is the good data set of conftest.py with one fault, as real files; all policies are
`fail` where the default would mend the fault without stopping.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runkey.errors import DataError, RunkeyError

TRAIN = "data/annotations/instances_train.json"
VAL = "data/annotations/instances_val.json"
MALFORMED_IMAGE = "set data.checks.malformed_image: drop in params.yaml or mend the file"
MALFORMED_BOX = "set data.checks.malformed_annotation: drop in params.yaml or mend the file"


@dataclass(frozen=True)
class Case:
    name: str
    change: Callable[[Any], Any]
    line: str
    options: dict[str, Any] = field(default_factory=dict)


def image(number: int, **fields: Any) -> Callable[[Any], None]:
    """Change fields of a train image; `None` takes the field away."""

    def change(folder: Any) -> None:
        entry = folder.train["images"][number]
        entry.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del entry[name]

    return change


def annotation(number: int, **fields: Any) -> Callable[[Any], None]:
    def change(folder: Any) -> None:
        entry = folder.train["annotations"][number]
        entry.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del entry[name]

    return change


def text(split: str, content: str | bytes | None) -> Callable[[Any], None]:
    return lambda folder: folder.texts.update({split: content})


def without_list(name: str) -> Callable[[Any], None]:
    return lambda folder: folder.train.pop(name)


def categories(split: str, *entries: Any) -> Callable[[Any], None]:
    return lambda folder: getattr(folder, split).update(categories=list(entries))


def policy(kind: str) -> dict[str, Any]:
    return {"checks": {kind: "fail"}}


def truncated(folder: Any) -> None:
    path = folder.data / "train/b.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def png_bomb(folder: Any) -> None:
    """A valid PNG header of 30000x30000 pixels, in a file of a hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (folder.data / "train/b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    image(1, file_name="b.png", width=30000, height=30000)(folder)


def link_out(folder: Any) -> None:
    outside = folder.root / "secret.jpg"
    folder.picture(9).save(outside)
    (folder.data / "train/b.jpg").unlink()
    (folder.data / "train/b.jpg").symlink_to(outside)


def link_folder_out(folder: Any) -> None:
    outside = folder.root / "elsewhere"
    (folder.data / "train").rename(outside)
    (folder.data / "train").symlink_to(outside, target_is_directory=True)


def exif(folder: Any) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    folder.picture(5).save(folder.data / "train/b.jpg", exif=tags)


def save_as(mode: str, suffix: str = "jpg") -> Callable[[Any], None]:
    def change(folder: Any) -> None:
        name = f"b.{suffix}"
        folder.picture(5).convert(mode).save(folder.data / "train" / name)
        image(1, file_name=name)(folder)

    return change


def sixteen_bits(folder: Any) -> None:
    Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(folder.data / "train/b.png")
    image(1, file_name="b.png")(folder)


def floats(folder: Any) -> None:
    Image.fromarray(np.full((30, 40), 0.5, np.float32)).save(folder.data / "train/b.tif")
    image(1, file_name="b.tif")(folder)


def transparent_palette(folder: Any) -> None:
    palette = folder.picture(5).convert("P")
    palette.save(folder.data / "train/b.png", transparency=0)
    image(1, file_name="b.png")(folder)


def also_in_val(folder: Any) -> None:
    content = (folder.data / "train/b.jpg").read_bytes()
    (folder.data / "val/copy.jpg").write_bytes(content)
    folder.val["images"].append({"id": 13, "file_name": "copy.jpg", "width": 40, "height": 30})


def same_file_in_both(folder: Any) -> None:
    folder.val["images"][0]["file_name"] = "train/c.jpg"


def two_train_jsons(folder: Any) -> None:
    (folder.data / "annotations/instances_train2017.json").write_text("{}")


def no_json_fits(folder: Any) -> None:
    folder.texts.update(train=None, val=None)
    for name in ("captions.json", "keypoints.json"):
        (folder.data / "annotations" / name).write_text("{}")


def no_object_in_train(folder: Any) -> None:
    for entry in folder.train["annotations"]:
        entry["iscrowd"] = 1
        entry["segmentation"] = {"counts": [600, 600], "size": [30, 40]}


def all_images_missing(folder: Any) -> None:
    for path in (folder.data / "train").iterdir():
        path.unlink()


def one_image_alone(folder: Any) -> None:
    folder.train["images"] = folder.train["images"][:1]
    folder.texts["val"] = None


CASES = [
    # The JSON files.
    Case(
        "no JSON",
        lambda folder: folder.texts.update(train=None, val=None),
        "data: no annotations found; put there annotations/instances_train*.json with "
        "instances_val*.json, or one JSON to be split",
    ),
    Case(
        "two JSON for one split",
        two_train_jsons,
        "data/annotations: more than one JSON of a split (annotations/instances_train.json, "
        "annotations/instances_train2017.json); leave one of them",
    ),
    Case(
        "JSON of other kinds",
        no_json_fits,
        "data: cannot tell which JSON to take (annotations/captions.json, "
        "annotations/keypoints.json); leave annotations/instances_train*.json with "
        "instances_val*.json, or one JSON to be split",
    ),
    Case(
        "not JSON",
        text("train", '{"images": [\n  {"id": 1,, "file_name": "a.jpg"}]}'),
        f"{TRAIN}: not JSON (line 2, column 12: Expecting property name enclosed in double "
        "quotes); mend the file or export it again",
    ),
    Case(
        "cut-off JSON",
        text("val", '{"images": [{"id": 1'),
        f"{VAL}: not JSON (line 1, column 21: Expecting ',' delimiter); "
        "mend the file or export it again",
    ),
    Case(
        "not UTF-8",
        text("train", '{"images": "Bäume"}'.encode("latin-1")),
        f"{TRAIN}: not JSON (byte 13 is not UTF-8); mend the file or export it again",
    ),
    Case(
        "nested too deeply",
        text("train", "[" * 100_000),
        f"{TRAIN}: not JSON (nested too deeply); mend the file or export it again",
    ),
    Case(
        "number without end",
        text("train", '{"images": [' + "1" * 5000 + "]}"),
        f"{TRAIN}: not JSON (a number of thousands of digits); mend the file or export it again",
    ),
    Case(
        "a list on top",
        text("train", "[]"),
        f"{TRAIN}: not an object with the lists images, annotations and categories; "
        "export it as COCO detection",
    ),
    *(
        Case(
            f"no {name}",
            without_list(name),
            f"{TRAIN}: no list `{name}`; export it as COCO detection "
            "(the lists images, annotations and categories)",
        )
        for name in ("images", "annotations", "categories")
    ),
    Case(
        "no image listed",
        lambda folder: folder.train.update(images=[]),
        f"{TRAIN}: the list `images` is empty; export the data set again",
    ),
    # Categories.
    Case(
        "no category",
        categories("train"),
        f"{TRAIN}: the list `categories` is empty; export the data set again",
    ),
    Case(
        "category id is a string",
        categories("train", {"id": "1", "name": "ball"}),
        f'{TRAIN}: categories[0]: id is "1"; '
        "give every category an integer id and a name of its own",
    ),
    Case(
        "category without a name",
        categories("train", {"id": 1, "name": "ball"}, {"id": 7}),
        f"{TRAIN}: category 7: name is missing; "
        "give every category an integer id and a name of its own",
    ),
    Case(
        "category id twice",
        categories("train", {"id": 1, "name": "ball"}, {"id": 1, "name": "cube"}),
        f"{TRAIN}: category 1 (cube) is listed twice; "
        "give every category an integer id and a name of its own",
    ),
    Case(
        "category name twice",
        categories("val", {"id": 1, "name": "ball"}, {"id": 2, "name": "ball"}),
        f"{VAL}: category name ball has the ids 1 and 2; "
        "give every category one id and its own name",
    ),
    Case(
        "train and val disagree",
        categories("val", {"id": 1, "name": "ball"}, {"id": 7, "name": "cone"}),
        f"{VAL}: category 7 is cone, but cube in {TRAIN}; give train and val the same categories",
    ),
    # Entries of `images`.
    Case(
        "image id is a string",
        image(1, id="2"),
        f'{TRAIN}: images[1]: id is "2", a whole number is wanted; {MALFORMED_IMAGE} '
        "(1 more such fault in prepared/report.json)",
    ),
    Case(
        "image without a file name",
        image(1, file_name=None),
        f"{TRAIN}: images[1] (id 2): file_name is missing, a file's name is wanted; "
        f"{MALFORMED_IMAGE}",
    ),
    Case(
        "file name is a number",
        image(1, file_name=7),
        f"{TRAIN}: images[1] (id 2): file_name is 7, a file's name is wanted; {MALFORMED_IMAGE}",
    ),
    Case(
        "file name with a line break",
        image(1, file_name="b\n.jpg"),
        f'{TRAIN}: images[1] (id 2): file_name is "b\\n.jpg", a file\'s name is wanted; '
        f"{MALFORMED_IMAGE}",
    ),
    Case(
        "image without a width",
        image(1, width=None),
        f"{TRAIN}: images[1] (id 2): width is missing, a whole number is wanted; {MALFORMED_IMAGE}",
    ),
    Case(
        "image of height 0",
        image(1, height=0),
        f"{TRAIN}: images[1] (id 2): width 40 and height 0, positive numbers are wanted; "
        f"{MALFORMED_IMAGE}",
    ),
    Case(
        "image is no object",
        lambda folder: folder.train["images"].append("d.jpg"),
        f"{TRAIN}: images[3]: id is missing, a whole number is wanted; {MALFORMED_IMAGE}",
    ),
    Case(
        "image id twice",
        lambda folder: (
            folder.train["images"].append(
                {"id": 2, "file_name": "x.jpg", "width": 40, "height": 30}
            )
            or folder.picture(8).save(folder.data / "train/x.jpg")
        ),
        f"{TRAIN}: image 2 (x.jpg) has the same id as image 2 (b.jpg); "
        "set data.checks.duplicate_image: drop in params.yaml or mend the file",
    ),
    Case(
        "file twice",
        image(2, file_name="a.jpg"),
        f"{TRAIN}: image 3 (a.jpg) has the same file as image 1 (a.jpg); "
        "set data.checks.duplicate_image: drop in params.yaml or mend the file",
    ),
    # File names.
    Case(
        "file not there",
        image(1, file_name="gone.jpg"),
        f"{TRAIN}: image 2 (gone.jpg) not found in data/train, data, data/annotations; "
        "set data.checks.missing_image: drop in params.yaml or mend the file",
    ),
    Case(
        "absolute file name",
        image(1, file_name="/etc/passwd"),
        f"{TRAIN}: image 2 (/etc/passwd): its name is an absolute path; "
        "set data.checks.unsafe_path: drop in params.yaml or mend the file",
    ),
    Case(
        "absolute Windows file name",
        image(1, file_name="C:\\pictures\\b.jpg"),
        f"{TRAIN}: image 2 (C:/pictures/b.jpg): its name is an absolute path; "
        "set data.checks.unsafe_path: drop in params.yaml or mend the file",
    ),
    Case(
        "file name with ..",
        image(1, file_name="..\\train\\b.jpg"),
        f"{TRAIN}: image 2 (../train/b.jpg): its name has `..` in it; "
        "set data.checks.unsafe_path: drop in params.yaml or mend the file",
    ),
    Case(
        "link out of the data folder",
        link_out,
        "data/train/b.jpg: image 2 (b.jpg) is a link that leaves data; "
        "set data.checks.unsafe_path: drop in params.yaml or mend the file",
    ),
    Case(
        "linked image folder",
        link_folder_out,
        "data/train/a.jpg: image 1 (a.jpg) is a link that leaves data; "
        "set data.checks.unsafe_path: drop in params.yaml or mend the file "
        "(2 more such faults in prepared/report.json)",
    ),
    # Files.
    Case(
        "truncated JPEG",
        truncated,
        "data/train/b.jpg: image 2 is cut short or damaged; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "a text as an image",
        lambda folder: (folder.data / "train/b.jpg").write_text("<html>404</html>"),
        "data/train/b.jpg: image 2 is no image of a known format; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "empty file",
        lambda folder: (folder.data / "train/b.jpg").write_bytes(b""),
        "data/train/b.jpg: image 2 is empty; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "decompression bomb",
        png_bomb,
        "data/train/b.png: image 2 is 30000x30000, more than data.max_megapixels: 100; "
        "set data.checks.too_large_image: drop in params.yaml or mend the file",
    ),
    Case(
        "float pixels",
        floats,
        "data/train/b.tif: image 2 has 32-bit pixels (mode F) of no known range; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "other size than in the JSON",
        image(1, width=80),
        "data/train/b.jpg: image 2 is 40x30, but 80x30 in the JSON; "
        "set data.checks.size_mismatch: fix or drop in params.yaml or mend the file",
    ),
    Case(
        "EXIF rotation",
        exif,
        "data/train/b.jpg: image 2 is to be turned by EXIF (orientation 6); "
        "set data.checks.exif_rotation: fix or drop in params.yaml or mend the file",
        policy("exif_rotation"),
    ),
    *(
        Case(
            name,
            change,
            f"data/train/b.{suffix}: image 2 is of mode {mode}; "
            "set data.checks.unusual_mode: fix or drop in params.yaml or mend the file",
            policy("unusual_mode"),
        )
        for name, change, suffix, mode in (
            ("grey image", save_as("L"), "jpg", "L"),
            ("CMYK image", save_as("CMYK"), "jpg", "CMYK"),
            ("16-bit image", sixteen_bits, "png", "I;16"),
            ("palette image", transparent_palette, "png", "P"),
            ("transparent image", save_as("RGBA", "png"), "png", "RGBA"),
        )
    ),
    # Entries of `annotations`.
    Case(
        "annotation without an id",
        annotation(1, id=None),
        f"{TRAIN}: annotations[1]: id is missing, a whole number is wanted; {MALFORMED_BOX}",
    ),
    Case(
        "category id is a fraction",
        annotation(1, category_id=1.5),
        f"{TRAIN}: annotations[1] (id 102): category_id is 1.5, a whole number is wanted; "
        f"{MALFORMED_BOX}",
    ),
    Case(
        "box of three numbers",
        annotation(1, bbox=[1, 2, 3]),
        f"{TRAIN}: annotations[1] (id 102): bbox is [1, 2, 3], [left, top, width, height] is "
        f"wanted; {MALFORMED_BOX}",
    ),
    Case(
        "iscrowd is a word",
        annotation(1, iscrowd="no"),
        f'{TRAIN}: annotations[1] (id 102): iscrowd is "no", 0 or 1 is wanted; {MALFORMED_BOX}',
    ),
    Case(
        "annotation id twice",
        annotation(1, id=101),
        f"{TRAIN}: image 1 (a.jpg), annotation 101: its id occurs before; "
        "set data.checks.duplicate_annotation: fix or drop in params.yaml or mend the file",
        policy("duplicate_annotation"),
    ),
    Case(
        "unknown category",
        annotation(1, category_id=2),
        f"{TRAIN}: image 1 (a.jpg), annotation 102 is of category 2, which `categories` does not "
        "list; set data.checks.unknown_category: drop in params.yaml or mend the file",
    ),
    Case(
        "unknown image",
        annotation(1, image_id=11),
        f"{TRAIN}: annotation 102 is of image 11, which `images` does not list; "
        "set data.checks.unknown_image: drop in params.yaml or mend the file",
    ),
    # Boxes.
    Case(
        "empty box",
        annotation(1, bbox=[4, 5, 0, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [4, 5, 0, 6] has no area; "
        "set data.checks.empty_box: drop in params.yaml or mend the file",
        policy("empty_box"),
    ),
    Case(
        "negative box",
        annotation(1, bbox=[20, 5, -3.5, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [20, 5, -3.5, 6] has a negative side; "
        "set data.checks.negative_box: fix or drop in params.yaml or mend the file",
    ),
    Case(
        "NaN box",
        annotation(1, bbox=[float("nan"), 5, 3, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [nan, 5, 3, 6] is not four finite numbers; "
        "set data.checks.not_finite_box: drop in params.yaml or mend the file",
    ),
    Case(
        "infinite box",
        annotation(1, bbox=[1, 5, float("inf"), 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [1, 5, inf, 6] is not four finite numbers; "
        "set data.checks.not_finite_box: drop in params.yaml or mend the file",
    ),
    Case(
        "box of words",
        annotation(1, bbox=[1, "5", 3, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [1, '5', 3, 6] is not four finite numbers; "
        "set data.checks.not_finite_box: drop in params.yaml or mend the file",
    ),
    Case(
        "box outside",
        annotation(1, bbox=[40, 5, 3, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [40, 5, 3, 6] is outside the image of "
        "40x30; set data.checks.outside_box: drop in params.yaml or mend the file",
        policy("outside_box"),
    ),
    Case(
        "box over the edge",
        annotation(1, bbox=[30, 5, 15.5, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [30, 5, 15.5, 6] reaches over the image of "
        "40x30 by 5.5 pixels; "
        "set data.checks.overhanging_box: fix or drop in params.yaml or mend the file",
        policy("overhanging_box"),
    ),
    Case(
        "bad area",
        annotation(1, area=-1),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: area -1 is no positive number; "
        "set data.checks.bad_area: fix or drop in params.yaml or mend the file",
        policy("bad_area"),
    ),
    # The two splits.
    Case(
        "a copy of a train image in val",
        also_in_val,
        f"{TRAIN}: image 2 (train/b.jpg) is image 13 (val/copy.jpg) of {VAL} too; "
        "set data.checks.leaked_image: drop in params.yaml or mend the file",
    ),
    Case(
        "one file in both splits",
        same_file_in_both,
        f"{TRAIN}: image 3 (train/c.jpg) is image 11 (train/c.jpg) of {VAL} too; "
        "set data.checks.leaked_image: drop in params.yaml or mend the file",
    ),
    Case(
        "no image left",
        all_images_missing,
        f"{TRAIN}: no image is left for train; "
        "add annotated images or see what was left out in prepared/report.json",
        {"checks": {"missing_image": "drop"}},
    ),
    Case(
        "no object in train",
        no_object_in_train,
        f"{TRAIN}: no image for train has an object; "
        "add annotated images or see what was left out in prepared/report.json",
    ),
    Case(
        "one image to split",
        one_image_alone,
        f"{TRAIN}: train and val need an image each, but only 1 (not counting copies) passed the "
        "checks; add images or see prepared/report.json",
        {"checks": {"unknown_image": "drop"}},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line(folder, case):
    case.change(folder)
    folder.write()

    with pytest.raises(DataError) as caught:
        folder.prepare(**case.options)

    assert str(caught.value) == case.line
    assert "\n" not in case.line
    report = folder.report()
    assert report["passed"] is False
    assert any(item["policy"] == "fail" for item in report["items"])
    assert not (folder.out / "train.json").exists()


def test_no_data_folder(folder):
    with pytest.raises(DataError) as caught:
        folder.prepare(path="elsewhere/")

    assert str(caught.value) == (
        "elsewhere: no such folder; run `dvc pull data.dvc` or set data.path in params.yaml"
    )


def test_there_are_as_many_cases_as_promised():
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_all_faults_are_found_before_the_first_is_told(folder):
    annotation(1, category_id=2)(folder)
    annotation(0, bbox=[1, 2, -3, 4])(folder)
    truncated(folder)
    folder.val["images"][1]["file_name"] = "gone.jpg"
    folder.write()

    with pytest.raises(RunkeyError, match=r"\(3 more such faults in prepared/report\.json\)$"):
        folder.prepare()

    kinds = [item["kind"] for item in folder.report()["items"]]
    assert kinds == ["unknown_category", "negative_box", "unreadable_image", "missing_image"]


def test_a_failed_run_leaves_no_index_of_an_earlier_one(folder):
    folder.run()
    assert (folder.out / "train.json").exists()
    folder.train["annotations"][0]["category_id"] = 99

    with pytest.raises(DataError):
        folder.run()

    left = sorted(path.name for path in folder.out.iterdir())
    assert left == ["report.json"]
    assert json.loads((folder.out / "report.json").read_text())["passed"] is False
