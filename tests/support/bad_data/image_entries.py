"""Bad entries of the list `images`, and file names that lead nowhere or elsewhere."""

from __future__ import annotations

from typing import Any

from tests.support.bad_data.faults import MALFORMED_IMAGE, TRAIN, Case, image, policy


def link_out(folder: Any) -> None:
    outside = folder.root / "secret.jpg"
    folder.picture(9).save(outside)
    (folder.data / "train/b.jpg").unlink()
    (folder.data / "train/b.jpg").symlink_to(outside)


def link_folder_out(folder: Any) -> None:
    outside = folder.root / "elsewhere"
    (folder.data / "train").rename(outside)
    (folder.data / "train").symlink_to(outside, target_is_directory=True)


CASES = [
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
    Case(
        "file copied",
        lambda folder: (folder.data / "train/c.jpg").write_bytes(
            (folder.data / "train/b.jpg").read_bytes()
        ),
        f"{TRAIN}: image 3 (c.jpg) has the same bytes as image 2 (train/b.jpg), and other boxes or "
        "classes; set data.checks.copied_image: drop in params.yaml or mend the file",
        policy("copied_image"),
    ),
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
        "put the file itself there, or see docs/your-data.md#data-on-another-drive",
    ),
    Case(
        "linked image folder",
        link_folder_out,
        "data/train/a.jpg: image 1 (a.jpg) is a link that leaves data; "
        "put the file itself there, or see docs/your-data.md#data-on-another-drive "
        "(2 more such faults in prepared/report.json)",
    ),
]
