"""`runkey predict`: memory and time on odd files and on ten times as many; AP with tiles.

    python -m benchmarks.predict --model MODEL... --data DATA [--many 10000] [--parts mixed drawn]

MODEL is a folder `model/` of the sample, or an export of it; DATA the sample's `data/`. Each
measurement is a process of its own with one thread of arithmetic, so that seconds of CPU can be
compared. Writes `benchmarks/results/predict.md`, and keeps what `--parts` does not measure anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "benchmarks/results/predict.md"
MIB = 2**20
COUNT, BROKEN, GREY, DEEP, TURNED, ANIMATED = 1000, 20, 40, 40, 80, 20
CELL = (256, 192)
"""Width and height of an image in a mosaic."""
PARTS = {
    "mixed": f"{COUNT:,} mixed files",
    "tiles": "Small objects in large images: tiles",
    "lists": "Many images, lists only",
    "drawn": "Many images, with drawn images and the sheet",
}
TILES = (None, "256", "256x256", "192", "128")


def main() -> None:
    """Make the files, measure, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    kept = chosen.out.read_text().split("\n## ")[1:] if chosen.out.is_file() else []
    sections = {text.split("\n")[0]: text for text in kept}
    with tempfile.TemporaryDirectory(prefix="predict-") as name:
        folder = Path(name)
        photos = sorted(chosen.data.glob("train*/*.jpg")) + sorted(chosen.data.glob("val*/*.jpg"))
        counts = (COUNT, chosen.many)
        for count in counts:
            link_photos(photos, folder / str(count), count)
        measure = {
            "mixed": partial(_mixed, chosen.model[0], photos, folder / "mixed"),
            "tiles": partial(_tiles, chosen.model[0], chosen.data, folder / "mosaic"),
            "lists": partial(_lists, chosen.model, len(photos), folder, counts),
            "drawn": partial(_drawn, chosen.model[0], folder, counts),
        }
        for part in chosen.parts:
            load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
            text = (
                f"{PARTS[part]}\n\n{measure[part]()}\n{time.strftime('%Y-%m-%d')}; load {load}.\n"
            )
            sections[PARTS[part]] = text
            written = [sections[title] for title in PARTS.values() if title in sections]
            chosen.out.write_text("\n## ".join([_head(), *written]), encoding="utf-8")


def _head() -> str:
    return (
        "# Predicting on many files\n\n`python -m benchmarks.predict --model MODEL... --data data`;"
        f" {len(os.sched_getaffinity(0))} cores ({platform.machine()}), Python"
        f" {platform.python_version()}; one thread of arithmetic. Other work on the machine"
        " stretches seconds but not CPU seconds.\n"
    )


@dataclass(frozen=True)
class Measured:
    """One run of the command."""

    code: int
    output: str
    wall: float
    cpu: float
    peak_mib: float


def _predict(model: Path, *arguments: str | Path) -> Measured:
    """Run `runkey predict` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "100"}
    command = [sys.executable, "-m", "runkey", "predict", str(model), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - began
        said.seek(0)
        text = said.read()
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{' '.join(command[3:])[:90]}: {wall:.0f} s, {usage.ru_maxrss / 1024:.0f} MiB")
    return Measured(process.returncode, text, wall, cpu, usage.ru_maxrss / 1024)


# A thousand files as they are found.


def _mixed(model: Path, photos: list[Path], folder: Path) -> str:
    """Predict on `COUNT` files, of which many are odd."""
    kinds = make_mixed(photos, folder / "files")
    done = _predict(model, folder / "files", "--out", folder / "out")
    plain = _predict(model, folder / "files", "--out", folder / "lists", "--write", "json,csv")
    skipped = (folder / "out/skipped.csv").read_text().splitlines()[1:]
    written = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    made = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    said = done.output.replace(str(folder / "out"), "OUT").replace(f"{folder}/", "")
    lines = [
        f"{made}. Exit code {done.code}, {len(skipped)} skipped, {written / 1e6:.0f} MB written.",
        "\n```\n" + said.strip() + "\n```\n",
        "| outputs | s | CPU s | peak MiB |",
        "|---|---|---|---|",
    ]
    for what, one in {"lists, drawn images, sheet": done, "lists": plain}.items():
        lines.append(f"| {what} | {one.wall:.0f} | {one.cpu:.0f} | {one.peak_mib:.0f} |")
    (huge,) = (folder / "files").glob("*-huge.jpg")
    huge.unlink()
    less = _predict(model, folder / "files", "--out", folder / "lists", "--write", "json,csv")
    more = plain.peak_mib - less.peak_mib
    lines.append(f"\nThe image of 100 megapixels takes {more:.0f} MiB of the peak.\n")
    return "\n".join(lines)


def make_mixed(photos: list[Path], folder: Path) -> dict[str, int]:
    """Write `COUNT` files; return how many of each kind."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = iter(f"{number:04}" for number in range(COUNT))
    source = iter(photos * (COUNT // len(photos) + 1))
    whole = photos[0].read_bytes()
    broken = [b"", b"\0" * 4000, b"<html>not found</html>", whole[:200], whole[: len(whole) // 2]]
    broken += [whole[:2], b"\x89PNG\r\n\x1a\n" + whole, whole[: len(whole) // 3], b"GIF89a", b"BM"]
    for number in range(BROKEN):
        (folder / f"{next(names)}-broken.jpg").write_bytes(broken[number % len(broken)])
    for _ in range(GREY):
        Image.open(next(source)).convert("L").save(folder / f"{next(names)}-grey.png")
    for _ in range(DEEP):
        grey = np.asarray(Image.open(next(source)).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 257).save(folder / f"{next(names)}-16-bit.tif")
    for number in range(TURNED):
        image, exif = Image.open(next(source)), Image.Exif()
        exif[0x0112] = orientation = 1 + number % 8
        image.save(folder / f"{next(names)}-exif-{orientation}.jpg", exif=exif, quality=92)
    for number in range(ANIMATED):
        frames = [Image.open(next(source)).convert("RGB").resize(CELL) for _ in range(3)]
        suffix = ("gif", "webp", "tif")[number % 3]
        path = folder / f"{next(names)}-several.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
    pixels = np.repeat(rng.integers(0, 256, (100, 1, 3), dtype=np.uint8), 100, axis=0)
    huge = np.ascontiguousarray(np.broadcast_to(pixels, (10_000, 10_000, 3)))
    Image.fromarray(huge).save(folder / f"{next(names)}-huge.jpg", quality=80)
    plain = list(names)
    for name in plain:
        (folder / f"{name}.jpg").write_bytes(next(source).read_bytes())
    return {
        "broken": BROKEN,
        "grey": GREY,
        "of 16 bits": DEEP,
        "with EXIF orientations 1 to 8": TURNED,
        "animations or of several pages": ANIMATED,
        "of 100 megapixels": 1,
        "plain JPEGs": len(plain),
    }


# Memory and speed with many files.


def link_photos(photos: list[Path], folder: Path, count: int) -> None:
    """Make a folder of `count` links to the photos, each as often as needed."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06}.jpg").symlink_to(photos[number % len(photos)].resolve())


_COLUMNS = ["| images | peak MiB | s | CPU s |", "|---|---|---|---|"]


def _row(count: int, done: Measured) -> str:
    return f"| {count:,} | {done.peak_mib:.0f} | {done.wall:.0f} | {done.cpu:.0f} |"


def _growth(counts: tuple[int, int], few: Measured, many: Measured) -> str:
    """Say what the images beyond the first take."""
    more = counts[1] - counts[0]
    rate = more / (many.cpu - few.cpu)
    growth = many.peak_mib / few.peak_mib - 1
    return (
        f"The other {more:,} images take {growth:+.1%} of memory and {1000 / rate:.1f} ms of CPU"
        f" each: {rate:.0f} images a CPU second.\n"
    )


def _lists(models: list[Path], photos: int, folder: Path, counts: tuple[int, int]) -> str:
    """JSON and CSV of many images, by each model."""
    lines = [
        f"The sample's {photos} images, linked as often as needed, with `--write json,csv`.\n",
    ]
    for number, model in enumerate(models):
        done = [
            _predict(
                model, folder / str(count), "--out", folder / f"lists-{number}-{count}",
                "--write", "json,csv", "--workers", "1",
            )
            for count in counts
        ]  # fmt: skip
        lines += [f"{_kind(model)}:\n", *_COLUMNS, *map(_row, counts, done)]
        lines.append("\n" + _growth(counts, *done))
    return "\n".join(lines)


def _kind(model: Path) -> str:
    """Say what runs a model."""
    if (model / "model.json").is_file():
        return "PyTorch, eager"
    return "ONNX Runtime" if list(model.glob("*.onnx")) else model.name


def _drawn(model: Path, folder: Path, counts: tuple[int, int]) -> str:
    """The default outputs of many images."""
    done = [
        _predict(model, folder / str(count), "--out", folder / f"drawn-{count}", "--workers", "1")
        for count in counts
    ]
    return "\n".join([*_COLUMNS, *map(_row, counts, done), "\n" + _growth(counts, *done)])


# Small objects in large images.


def make_mosaics(data: Path, folder: Path, side: int) -> Path:
    """Put val images side by side, `side` x `side` of them on a canvas; return the COCO file."""
    (path,) = data.glob("annotations/instances_val*.json")
    coco = json.loads(path.read_text())
    objects: dict[int, list[Any]] = {}
    for row in coco["annotations"]:
        objects.setdefault(row["image_id"], []).append(row)
    images: list[Any] = []
    rows: list[Any] = []
    folder.mkdir(parents=True)
    width, height = CELL
    for start in range(0, len(coco["images"]) - side * side + 1, side * side):
        canvas = Image.new("RGB", (width * side, height * side))
        number = len(images) + 1
        for at, entry in enumerate(coco["images"][start : start + side * side]):
            (file,) = data.glob(f"val*/{entry['file_name']}")
            image = Image.open(file).convert("RGB")
            scale = min(width / image.width, height / image.height)
            x, y = (at % side) * width, (at // side) * height
            canvas.paste(
                image.resize((int(image.width * scale), int(image.height * scale))), (x, y)
            )
            for row in objects.get(entry["id"], []):
                left, top, *sides = (scale * value for value in row["bbox"])
                box = [left + x, top + y, *sides]
                more = {"id": len(rows) + 1, "image_id": number, "area": sides[0] * sides[1]}
                rows.append(row | more | {"bbox": box})
        canvas.save(folder / f"{number}.png")
        size = {"width": canvas.width, "height": canvas.height}
        images.append({"id": number, "file_name": f"{number}.png", **size})
    truth = folder.parent / "mosaic.json"
    made = {"info": {}, "images": images, "annotations": rows, "categories": coco["categories"]}
    truth.write_text(json.dumps(made))
    return truth


def average_precision(truth: Path, results: Path, most: int = 300) -> tuple[float, float]:
    """Return AP and AP50 of a results file, with up to `most` detections of an image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(truth))
        objects.dataset.setdefault("info", {})  # loadRes copies it
        run = COCOeval(objects, objects.loadRes(str(results)), "bbox")
        run.params.maxDets = [1, 10, most]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, -1]
    return tuple(float(part[part > -1].mean()) for part in (precision, precision[0]))


def _tiles(model: Path, data: Path, folder: Path) -> str:
    side = 4
    truth = make_mosaics(data, folder / "images", side)
    count = len(json.loads(truth.read_text())["images"])
    lines = [
        f"{side * side} val images of the sample side by side on a canvas of"
        f" {side * CELL[0]}x{side * CELL[1]} pixels, {count} canvases, some 70 objects on each. The"
        " model was trained on images of 160x120 pixels.\n",
        "| `--tile` | `--overlap` | AP | AP50 | s an image |",
        "|---|---|---|---|---|",
    ]
    for tile in TILES:
        for overlap in ("0.2", "0.4") if tile else ("",):
            out = folder / f"out-{tile}-{overlap}"
            more = ["--tile", tile, "--overlap", overlap] if tile else []
            _predict(
                model, folder / "images", "--out", out, "--write", "results", "--coco", truth,
                "--score", "0", *more,
            )  # fmt: skip
            ap, ap50 = average_precision(truth, out / "results.json")
            seconds = json.loads((out / "predict.json").read_text())["seconds"] / count
            cells = f"{tile or 'none'} | {overlap} | {ap:.3f} | {ap50:.3f} | {seconds:.2f}"
            lines.append(f"| {cells} |")
    lines.append(
        "\nA tile shows objects at the size that the model knows; one of another shape than the"
        " training images (256x256) costs AP, which is why a width alone gives tiles of 4:3.\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
