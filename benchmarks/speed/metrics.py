"""COCO metrics of 5,000 images x 100 detections: against pycocotools and its faster relatives.

Each contestant runs in a process of its own, which says its processor time and by how much its
peak of memory grew:

    python -m benchmarks.speed.metrics CONTESTANT TRUTH.json DETECTIONS.json
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.pairs import OURS, Row, check
from benchmarks.speed.peers import find_packages
from runkey.data.index import ClassName, ImageRecord
from runkey.evaluation.coco import SUMMARY_NAMES, evaluate_results
from runkey.evaluation.detections import DetectionArrays

IMAGES, DETECTIONS, CLASSES = 5000, 100, 80
PYCOCOTOOLS, FASTER, HOTCOCO = "pycocotools", "faster-coco-eval", "hotcoco"
FROM_LIST = f"{OURS}, from COCO's list of detections"
_WIDTH, _HEIGHT = 640, 480


def measure_metrics(rounds: int, images: int = IMAGES) -> Iterator[Row]:
    """Time the twelve numbers, from the detections in memory on."""
    names = (OURS, FROM_LIST, PYCOCOTOOLS, FASTER, HOTCOCO)
    name = f"COCO metrics, {images:,} images x {DETECTIONS} detections x {CLASSES} classes"
    times: dict[str, list[float]] = {one: [] for one in names}
    extra: dict[str, dict[str, float]] = {}
    numbers: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = made_up_detections(Path(folder), images)
        for _ in range(rounds):
            for one in names:
                found = _in_process(one, *paths)
                times[one].append(found["cpu_ms"])
                numbers[one] = found["stats"]
                extra[one] = {"peak_mib": found["peak_mib"]}
    oracle = np.array(numbers[PYCOCOTOOLS])
    differences = {one: float(np.abs(np.array(numbers[one]) - oracle).max()) for one in names}
    yield Row(name, times, (PYCOCOTOOLS,), check(name, differences, 1e-9), extra)


def made_up_detections(folder: Path, images: int) -> tuple[Path, Path]:
    """Write ground truth and detections in COCO's format, from a seed.

    Of the 100 detections of an image one is near each object; the others are anywhere, most of
    them of the image's classes.
    """
    rng = np.random.default_rng(0)
    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        count = int(min(1 + rng.geometric(1 / 6.3), 60))
        boxes = _boxes(rng, count)
        labels = rng.choice(rng.integers(1, CLASSES + 1, 3), count)
        truth += [
            {
                "id": len(truth) + index + 1,
                "image_id": image,
                "category_id": int(label),
                "bbox": box.tolist(),
                "area": float(box[2] * box[3] * 0.6),
                "iscrowd": int(rng.random() < 0.01),
            }
            for index, (box, label) in enumerate(zip(boxes, labels, strict=True))
        ]
        noise = rng.normal(0, 0.12, (count, 4)) * np.tile(boxes[:, 2:], 2)
        near = boxes + noise
        near[:, 2:] = np.maximum(near[:, 2:], 1)
        others = DETECTIONS - count
        any_class = rng.integers(1, CLASSES + 1, others)
        classes = np.where(rng.random(others) < 0.7, rng.choice(labels, others), any_class)
        every = np.concatenate((near, _boxes(rng, others))).round(2)
        scores = np.concatenate((rng.beta(4, 2, count), rng.beta(1, 6, others)))
        results += [
            {"image_id": image, "category_id": int(c), "bbox": box.tolist(), "score": float(s)}
            for c, box, s in zip(np.concatenate((labels, classes)), every, scores, strict=True)
        ]
    listed = [{"id": i + 1, "width": _WIDTH, "height": _HEIGHT} for i in range(images)]
    categories = [{"id": c + 1, "name": f"class {c + 1}"} for c in range(CLASSES)]
    content = {"info": {}, "images": listed, "categories": categories, "annotations": truth}
    paths = folder / "truth.json", folder / "detections.json"
    for path, value in zip(paths, (content, results), strict=True):
        path.write_text(json.dumps(value), encoding="utf-8")
    return paths


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 4] left, top, width, height; sides as COCO's, from a few pixels up."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    sides = np.minimum(sides, (_WIDTH - 1, _HEIGHT - 1))
    corners = rng.random((count, 2)) * ((_WIDTH, _HEIGHT) - sides)
    return np.concatenate((corners, sides), axis=1).round(2)


def _in_process(contestant: str, truth: Path, detections: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed.metrics", contestant]
    done = subprocess.run(
        [*command, str(truth), str(detections)], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ours(truth: Path, results: list[Any], *, arrays: bool) -> Callable[[], list[float]]:
    """As an evaluation does it, whose detections are `arrays`, or from a list in COCO's format."""
    content = json.loads(truth.read_text(encoding="utf-8"))
    classes = [
        ClassName(number, one["id"], one["name"])
        for number, one in enumerate(content["categories"])
    ]
    index = {one.id: number for number, one in enumerate(classes)}
    annotations: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        annotations[one["image_id"]].append(one)
    records = [
        ImageRecord(
            id=image["id"],
            file="",
            width=image["width"],
            height=image["height"],
            rotate=0,
            mirror=False,
            boxes_xywh=tuple(tuple(one["bbox"]) for one in annotations[image["id"]]),
            labels=tuple(index[one["category_id"]] for one in annotations[image["id"]]),
            areas=tuple(one["area"] for one in annotations[image["id"]]),
            crowd=tuple(bool(one["iscrowd"]) for one in annotations[image["id"]]),
            annotation_ids=tuple(one["id"] for one in annotations[image["id"]]),
        )
        for image in content["images"]
    ]
    found = DetectionArrays.from_results(results, classes) if arrays else None

    def run() -> list[float]:
        detections = found or DetectionArrays.from_results(results, classes)
        summary = evaluate_results(records, classes, detections).summary
        return [-1.0 if summary[name] is None else summary[name] for name in SUMMARY_NAMES]

    return run


def _peer(module: str, evaluators: str, name: str) -> Any:
    """A peer with pycocotools' interface, its ground truth loaded."""

    def prepare(truth: Path, results: list[Any]) -> Callable[[], list[float]]:
        coco = import_module(module).COCO(str(truth))
        evaluator = getattr(import_module(evaluators), name)

        def run() -> list[float]:
            evaluation = evaluator(coco, coco.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            return [float(value) for value in evaluation.stats[:12]]

        return run

    return prepare


_PREPARE = {
    OURS: partial(_ours, arrays=True),
    FROM_LIST: partial(_ours, arrays=False),
    PYCOCOTOOLS: _peer("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
    FASTER: _peer("faster_coco_eval", "faster_coco_eval", "COCOeval_faster"),
    HOTCOCO: _peer("hotcoco", "hotcoco", "COCOeval"),
}


def _peak_kib(*, reset: bool = False) -> int:
    """Most memory that this process has taken since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Run one contestant and print what it took."""
    contestant, truth, detections = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    find_packages()
    with contextlib.redirect_stdout(io.StringIO()):
        results = json.loads(detections.read_text(encoding="utf-8"))
        run = _PREPARE[contestant](truth, results)
        before = _peak_kib(reset=True)
        start = time.process_time()
        stats = run()
        taken = time.process_time() - start
    peak = (_peak_kib() - before) / 1024
    print(json.dumps({"cpu_ms": 1000 * taken, "peak_mib": round(peak), "stats": stats}))


if __name__ == "__main__":
    main()
