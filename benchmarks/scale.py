"""What `prepare`, its index and an epoch's plan cost at the size of COCO.

    python -m benchmarks.scale --data COCO [--images 1000 10000 100000]

COCO holds annotations/instances_train*.json and its images, of which hard links make as many images
as are asked for, with 7.27 boxes each as in COCO (860,000 of 118,287 images).  Each row is measured
in processes of its own, in processor time.  The check for copied images is off, since all are.
`results/scale.md` is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "scale.md"
_BOXES = 860_000 / 118_287
_MIB = 2.0**20


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--part", choices=list(_PARTS))
    chosen = parser.parse_args()
    if chosen.part:
        print(json.dumps(_PARTS[chosen.part](chosen.data)))
        return
    rows = []
    for images in chosen.images:
        with tempfile.TemporaryDirectory(dir=chosen.data.parent) as folder:
            made = _make(chosen.data, Path(folder), images)
            found = {name: _run(name, Path(folder)) for name in _PARTS}
            rows.append(_row(images, made, found))
            print(rows[-1], flush=True)
    text = _HEAD.format(
        date=date.today(), cores=os.cpu_count(), python=platform.python_version(),
        rows="\n".join(rows),
    )  # fmt: skip
    RESULT.write_text(text, encoding="utf-8")


def _make(source: Path, root: Path, images: int) -> float:
    """Write data/ with hard links and a JSON; return the MiB of that."""
    (file,) = (source / "annotations").glob("instances_train*.json")
    content = json.loads(file.read_text())
    folder, rng = source / file.stem.removeprefix("instances_"), random.Random(0)
    (root / "data/annotations").mkdir(parents=True)
    (root / "data/train").mkdir()
    listed: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for i in range(images):
        image = content["images"][i % len(content["images"])]
        os.link(folder / image["file_name"], root / f"data/train/{i:012}.jpg")
        listed.append({**image, "id": i, "file_name": f"{i:012}.jpg"})
        for _ in range(int(_BOXES + rng.random())):
            width, height = rng.uniform(5, image["width"] / 2), rng.uniform(5, image["height"] / 2)
            box = [
                round(rng.uniform(0, image["width"] - width), 2),
                round(rng.uniform(0, image["height"] - height), 2),
                round(width, 2),
                round(height, 2),
            ]
            category = rng.choice(content["categories"])["id"]
            entry = {"id": len(boxes), "image_id": i, "category_id": category, "iscrowd": 0}
            boxes.append({**entry, "bbox": box, "area": box[2] * box[3]})
    text = json.dumps({**content, "images": listed, "annotations": boxes})
    path = root / "data/annotations/instances_train.json"
    path.write_text(text)
    return len(text) / _MIB


def _prepare(root: Path) -> dict[str, float]:
    from runkey.data.checks import SourceChecks
    from runkey.data.prepare import prepare
    from runkey.params import Data

    assert "torch" not in sys.modules
    SourceChecks._check_copy = lambda *_: None  # type: ignore[method-assign]
    before = time.process_time()
    prepare(Data(val_fraction=0.05), root, root / "prepared", 300)
    size = sum(file.stat().st_size for file in (root / "prepared").iterdir())
    return {"seconds": time.process_time() - before, "mib": size / _MIB} | _peak()


def _index(root: Path) -> dict[str, float]:
    from runkey.data.index import read_index

    start, before = time.process_time(), _peak()["peak"]
    index = read_index(root / "prepared/train.safetensors")
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak": _peak()["peak"] - before, "boxes": len(index.labels)}


def _plan(root: Path) -> dict[str, float]:
    from runkey.data.augment import Augmentation
    from runkey.data.index import read_index
    from runkey.data.sampler import GlobalBatchSampler
    from runkey.params import load_params

    params = load_params(Path(__file__).parents[1] / "presets" / "coco-detr-r50.yaml")
    index = read_index(root / "prepared/train.safetensors")
    sampler = GlobalBatchSampler(Augmentation(0, params.data), index.ids, index.sizes, 64)
    start = time.process_time()
    sampler.global_batches(1)[0]
    return {"seconds": time.process_time() - start} | _peak()


def _peak() -> dict[str, float]:
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


_PARTS = {"prepare": _prepare, "index": _index, "plan": _plan}


def _run(part: str, root: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", "--data", str(root), "--part", part]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(images: int, mib: float, found: dict[str, dict[str, float]]) -> str:
    prepare, index, plan = (found[part] for part in ("prepare", "index", "plan"))
    return (
        f"| {images:,} | {index['boxes']:,} | {mib:.0f} | {prepare['seconds']:.1f}"
        f" ({1000 * prepare['seconds'] / images:.2f}) | {prepare['peak']:.0f} |"
        f" {prepare['mib']:.1f} | {1000 * index['seconds']:.0f} ms, {index['peak']:.0f} MiB |"
        f" {1000 * plan['seconds']:.0f} ms |"
    )


# ruff: noqa: E501
_HEAD = """# Scale

`python -m benchmarks.scale --data COCO`, {date}; {cores} cores of an AMD EPYC without AMX,
processor time of all threads, Python {python}. Images are hard links to 80 of COCO, boxes are random, 7.27 an
image; 95% are train, whose index and epoch are measured.

| images | boxes of train | JSON, MiB | `prepare`, s (ms an image) | its peak, MiB | prepared/, MiB | index read, memory | epoch planned |
|---|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
