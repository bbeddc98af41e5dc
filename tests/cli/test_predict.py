"""`runkey predict` as it is typed: what it prints, its exit codes, its labels read by `convert`."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.command_line import REPOSITORY, Run
from tests.support.small_model import photograph

CONVERT = next(REPOSITORY.glob(".venv-convert/lib/python3*/site-packages/globox"), None)
SIZES = ((80, 60), (90, 40), (60, 80), (300, 200))


@pytest.fixture
def images(root: Path) -> Path:
    folder = root / "photos"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        photograph(number, *size).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def model(small_model_folder: Path) -> str:
    return str(small_model_folder)


def test_what_it_prints(run: Run, images: Path, model: str) -> None:
    (images / "notes.txt").write_text("no image")
    code, out, err = run("predict", model, "photos", "--score", "0", "--workers", "1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "left out: 1 file that is neither an image nor a video"
    assert lines[1].startswith("4 images, 96 detections in ")
    assert lines[1].endswith(" images/s)")
    assert "ball" in lines[2]
    assert lines[3] == "predictions/  predictions.json, predictions.csv, images/, sheet.jpg"
    assert not err
    mark = json.loads((images.parent / "predictions/predict.json").read_text())
    assert mark["model"] == model
    assert mark["sources"] == ["photos"]
    code, out, _ = run("predict", model, "photos/1.png", "--write", "csv", "--score", "0")
    assert code == 0
    assert "held earlier predictions: files of the same name are replaced" in out


def test_skipped_files_are_named_and_the_exit_code_is_3(run: Run, images: Path, model: str) -> None:
    for number in range(14):
        (images / f"bad{number:02}.jpg").write_bytes(b"\0")
    arguments = ("predict", model, "photos", "--write", "json", "--score", "0")
    code, out, err = run(*arguments)
    assert code == 3
    assert "4 images, 96 detections" in out
    lines = err.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("skipped bad00.jpg: is no image of a known format")
    assert lines[-1] == "skipped 14 files; 4 more are not shown: predictions/skipped.csv"
    assert len((images.parent / "predictions/skipped.csv").read_text().splitlines()) == 15
    code, out, _ = run(*arguments, "--json")
    answer = json.loads(out)
    assert code == 3
    assert answer["images"] == 4
    assert [one["file"] for one in answer["skipped"]] == [f"bad{n:02}.jpg" for n in range(14)]


def test_errors_are_one_line_and_leave_nothing(run: Run, images: Path, model: str) -> None:
    (images / "only-bad").mkdir()
    (images / "only-bad/a.png").write_bytes(b"")
    for arguments, text in (
        (("gone.jpg",), "gone.jpg: no such file or folder"),
        (("http://example.org/a.jpg",), "an address; --allow-urls lets predict read it"),
        (("photos", "--score", "2"), "--score 2: auto, a number from 0 to 1"),
        (("photos", "--score", "car=0.5"), "score: no class 'car'; the model has ball"),
        (("photos", "--write", "xml"), "--write xml: not one of"),
        (("photos", "--tile", "8"), "--tile 8x6: at least 32 pixels"),
        (("photos", "--coco", "photos/0.png"), "photos/0.png: no COCO file"),
        (("photos", "--out", "photos"), "photos: holds 0.png, which `runkey predict` has not"),
    ):
        code, out, err = run("predict", model, *arguments)
        assert (code, out) == (1, ""), arguments
        assert text in err
        lines = err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
        assert not (images.parent / "predictions").exists()
    code, _, err = run("predict", model, "photos/only-bad")
    assert code == 1
    assert "nothing could be read; predictions/skipped.csv says why" in err
    code, _, err = run("predict", "nowhere", "photos")
    assert code == 1
    assert "nowhere" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("nowhere", "photos"),
        ("model", "gone.jpg"),
        ("model", "photos/*.tif"),
        ("model", "photos", "--score", "2"),
        ("model", "photos", "--write", "xml"),
        ("model", "photos", "--tile", "wide"),
        ("model", "photos", "--nms", "2"),
        ("model", "photos", "--coco", "gone.json"),
    ],
)
def test_wrong_arguments_are_refused_before_torch_is_imported(
    images: Path, model: str, arguments: tuple[str, ...]
) -> None:
    (images.parent / "model").symlink_to(model)
    code = (
        "import sys; from runkey.cli import main\n"
        f"sys.argv = ['runkey', 'predict', *{arguments!r}]\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=images.parent,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (1, "False\n"), process.stderr
    assert process.stderr.startswith("error: ")


def test_a_list_on_stdin(
    run: Run, images: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("photos/3.png\nphotos/gone.png\nphotos/0.png\n"))
    code, _, err = run("predict", model, "-", "--write", "json", "--score", "0")
    assert code == 3
    assert "skipped photos/gone.png: no such file or folder" in err
    coco = json.loads((images.parent / "predictions/predictions.json").read_text())
    assert [one["file_name"] for one in coco["images"]] == ["3.png", "0.png"]


def test_animations_are_said(run: Run, images: Path, model: str) -> None:
    frames = [photograph(number) for number in range(3)]
    for name in ("a.gif", "b.gif"):
        frames[0].save(images / name, save_all=True, append_images=frames[1:])
    _, out, _ = run("predict", model, "photos/a.gif", "--write", "csv")
    assert "a.gif: an animation or a file of several pages; its first image is taken" in out
    _, out, _ = run("predict", model, "photos", "--write", "csv")
    assert "a.gif and 1 more: animations or files of several pages; the first image of" in out


def boxes_of(coco: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Class and box of each object, by the stem of its file."""
    names = {one["id"]: one["name"] for one in coco["categories"]}
    stems = {one["id"]: Path(one["file_name"]).stem for one in coco["images"]}
    found: dict[str, list[tuple[Any, ...]]] = {stem: [] for stem in stems.values()}
    for row in coco["annotations"]:
        found[stems[row["image_id"]]].append((names[row["category_id"]], *row["bbox"]))
    return {stem: sorted(rows) for stem, rows in found.items()}


@pytest.mark.skipif(CONVERT is None, reason="`make env-convert` installs globox")
@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_labels_come_back_by_convert(run: Run, images: Path, model: str, kind: str) -> None:
    assert run("predict", model, "photos", "--write", f"json,{kind}", "--score", "0.01")[0] == 0
    root = images.parent
    shutil.copytree(images, root / "labelled/images")
    shutil.copytree(root / "predictions" / kind, root / "labelled", dirs_exist_ok=True)
    (root / ".venv-convert").symlink_to(REPOSITORY / ".venv-convert")
    code, _, err = run("convert", "labelled", "coco", "--format", kind)
    assert code == 0, err
    (path,) = (root / "coco/annotations").iterdir()
    wanted = boxes_of(json.loads((root / "predictions/predictions.json").read_text()))
    read = boxes_of(json.loads(path.read_text()))
    assert sum(map(len, wanted.values())) > 10
    for stem, rows in wanted.items():
        assert [row[0] for row in read[stem]] == [row[0] for row in rows]
        for one, other in zip(read[stem], rows, strict=True):
            assert np.allclose(one[1:], other[1:], atol=0.011)
