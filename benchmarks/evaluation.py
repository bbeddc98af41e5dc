"""COCO metrics of a set of COCO val's size: time and memory of runkey and of other evaluators.

    uv venv /tmp/peers && uv pip install --python /tmp/peers/bin/python pycocotools==2.0.10 \
        hotcoco==1.3.0 faster-coco-eval==1.8.0
    python -m benchmarks.evaluation --peers /tmp/peers/bin/python [--images 5000] [--rounds 3]

Made-up images with 7 objects each on average, of 80 classes, and 100 detections, of which a third
lie on an object. Every evaluator starts from detections in memory, in a process of its own, in
turn, on one thread; times are the processor's, and memory is the peak above what the process held
before. `results/evaluation.md` is written anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "evaluation.md"
CLASSES, DETECTIONS = 80, 100
PEERS = {
    "pycocotools": "pycocotools",
    "faster-coco-eval": "faster_coco_eval",
    "hotcoco": "hotcoco",
}
SLOW = "pycocotools"
"""Is measured once, as is the cross-check by it."""
OURS = {
    "metrics": "**runkey**, metrics",
    "intervals": "runkey, 95% intervals of them",
    "images": "runkey, matches of each image and score thresholds",
    "files": "runkey, files of `evaluate`",
    "check": "runkey, cross-check by pycocotools, in one process",
}


# --- the set


def draw(folder: Path, images: int) -> None:
    """Write truth.json, detections.npz of a model and results.npy of the peers."""
    random = np.random.default_rng(0)
    share = 1 / np.arange(1, CLASSES + 1)
    share /= share.sum()
    ids = np.sort(random.choice(10**6, images, replace=False))
    annotations, scores, labels, boxes = [], [], [], []
    for id_ in ids.tolist():
        count = min(int(random.gamma(1.2, 6.1)), 90)
        objects = random.choice(CLASSES, 3, p=share)[random.integers(0, 3, count)]
        sides = np.exp(random.uniform(np.log(8), np.log(400), (count, 2)))
        truth = np.hstack([random.uniform(0, 1, (count, 2)) * (450 - sides), sides])
        areas = sides.prod(axis=1) * random.uniform(0.4, 1, count)
        crowd = random.random(count) < 0.01
        rows = zip(objects, truth.tolist(), areas.tolist(), crowd.tolist(), strict=True)
        annotations += [
            {
                "id": len(annotations) + n,
                "image_id": id_,
                "category_id": int(label) + 1,
                "bbox": box,
                "area": area,
                "iscrowd": int(is_crowd),
            }
            for n, (label, box, area, is_crowd) in enumerate(rows, start=1)
        ]
        found, score, label = _detect(random, truth, objects, share)
        order = np.argsort(-score, kind="stable")
        scores.append(score[order])
        labels.append(label[order])
        boxes.append(found[order])
    corners = np.stack(boxes).astype(np.float32)
    corners[..., 2:] += corners[..., :2]
    small = np.stack(scores).astype(np.float32)
    np.savez(folder / "detections.npz", ids=ids, scores=small, labels=labels, boxes=corners)
    exact = corners.astype(np.float64).reshape(-1, 4)
    exact[:, 2:] -= exact[:, :2]
    columns = [np.repeat(ids, DETECTIONS), *exact.T, small.ravel(), np.concatenate(labels) + 1]
    np.save(folder / "results.npy", np.stack(columns, axis=1))
    truth_json = {
        "images": [{"id": id_, "width": 640, "height": 480} for id_ in ids.tolist()],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)],
        "annotations": annotations,
        "info": {},
    }
    (folder / "truth.json").write_text(json.dumps(truth_json))


def _detect(random: Any, truth: Any, objects: Any, share: Any) -> tuple[Any, Any, Any]:
    found = np.exp(random.uniform(np.log(8), np.log(300), (DETECTIONS, 4)))
    label, score = random.choice(CLASSES, DETECTIONS, p=share), random.beta(1, 12, DETECTIONS)
    if len(truth):
        which, near = random.integers(0, len(truth), DETECTIONS), random.random(DETECTIONS) < 0.45
        noise = random.normal(0, 1, (DETECTIONS, 4)) * random.exponential(0.08, (DETECTIONS, 1))
        found[near] = (truth[which] + noise * np.tile(truth[which][:, 2:], 2))[near]
        same = near & (random.random(DETECTIONS) < 0.7)
        label[same], score[same] = objects[which][same], random.beta(2, 4, DETECTIONS)[same]
    found[:, 2:] = np.maximum(found[:, 2:], 1)
    return found, score, label


# --- one measurement, in a process of its own


def measure(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Run `work`; return its seconds and its peak memory above what was there before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    times, wall = os.times(), time.perf_counter()
    result = work()
    now = os.times()
    return {
        "cpu": sum(now[:2]) - sum(times[:2]),
        "wall": time.perf_counter() - wall,
        "mib": _memory("VmHWM") - before,
    }, result


def _memory(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def measure_peer(module: str, folder: Path) -> dict[str, Any]:
    """Evaluate with pycocotools or a package like it."""
    with contextlib.redirect_stdout(io.StringIO()):
        if module == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        elif module == "hotcoco":
            from hotcoco import COCO, COCOeval
        else:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        truth, results = COCO(str(folder / "truth.json")), np.load(folder / "results.npy")

        def work() -> Any:
            run = COCOeval(truth, truth.loadRes(results), "bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
            return run

        seconds, run = measure(work)
    return seconds | {"stats": [float(value) for value in list(run.stats)[:12]]}


def measure_runkey(folder: Path, *, check: bool) -> dict[str, Any]:
    """Evaluate as the stage does; the parts by `OURS`."""
    import torch

    from runkey.data.index import ClassName, ImageRecord
    from runkey.evaluation.coco import evaluate_results
    from runkey.evaluation.cross_check import check_metrics
    from runkey.evaluation.detections import DetectionArrays
    from runkey.evaluation.files import write_metrics, write_precision_recall, write_results
    from runkey.evaluation.intervals import bootstrap
    from runkey.evaluation.per_image import judge_images
    from runkey.evaluation.thresholds import best_thresholds
    from runkey.model.postprocess import Detections

    truth = json.loads((folder / "truth.json").read_text())
    classes = [ClassName(k, c["id"], c["name"]) for k, c in enumerate(truth["categories"])]
    of_image: dict[int, list[Any]] = {one["id"]: [] for one in truth["images"]}
    for one in truth["annotations"]:
        of_image[one["image_id"]].append(one)
    records = [
        ImageRecord(
            id=id_,
            file=f"{id_}.jpg",
            width=640,
            height=480,
            rotate=0,
            mirror=False,
            boxes_xywh=tuple(tuple(one["bbox"]) for one in some),
            labels=tuple(one["category_id"] - 1 for one in some),
            areas=tuple(one["area"] for one in some),
            crowd=tuple(bool(one["iscrowd"]) for one in some),
            annotation_ids=tuple(one["id"] for one in some),
        )
        for id_, some in of_image.items()
    ]
    del truth, of_image
    with np.load(folder / "detections.npz") as stored:
        ids = stored["ids"].tolist()
        tensors = [torch.from_numpy(stored[name]) for name in ("scores", "labels", "boxes")]
    found = {
        id_: Detections(*one) for id_, one in zip(ids, zip(*tensors, strict=True), strict=True)
    }
    measured: dict[str, Any] = {}

    def evaluate() -> Any:
        arrays = DetectionArrays.from_images(found)
        return arrays, evaluate_results(records, classes, arrays)

    measured["metrics"], (arrays, result) = measure(evaluate)
    measured["metrics"]["stats"] = [-1.0 if v is None else v for v in result.summary.values()]
    measured["intervals"], resampled = measure(lambda: bootstrap(result.matches, result.recalls))
    measured["images"], _ = measure(
        lambda: best_thresholds(judge_images(records, arrays), classes, "")
    )

    def write() -> None:
        write_metrics(folder / "metrics.json", result, resampled)
        write_precision_recall(folder / "precision_recall.json", result)
        write_results(folder / "predictions.json", arrays, classes)

    measured["files"], _ = measure(write)
    if check:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one process, whose time is seen
        measured["check"], _ = measure(lambda: check_metrics(result, records, classes, arrays))
    return measured


# --- all of them


def main() -> None:
    """Measure every evaluator in turn, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", help="python with the other evaluators", default=sys.executable)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        if args.one in PEERS:
            found = measure_peer(PEERS[args.one], args.folder)
        else:
            found = measure_runkey(args.folder, check=args.one == "runkey")
        sys.stdout.write(json.dumps(found))
        return
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OURS, *PEERS)}
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), args.images)
        for number in range(args.rounds):
            ours = "runkey without check" if number else "runkey"
            for one, found in _ask(sys.executable, ours, name).items():
                rounds[one].append(found)
            for peer in PEERS:
                if not number or peer != SLOW:
                    rounds[peer].append(_ask(args.peers, peer, name))
    RESULT.write_text(_table(rounds, args))
    sys.stdout.write(RESULT.read_text())


def _ask(python: str, one: str, folder: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    command = [python, "-m", "benchmarks.evaluation", "--one", one, "--folder", folder]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def _table(rounds: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    expected = rounds["pycocotools"][0]["stats"]
    lines = [
        "# COCO metrics",
        "",
        f"`python -m benchmarks.evaluation --images {args.images} --rounds {args.rounds}`,"
        f" {datetime.now(UTC):%Y-%m-%d}, 2 cores of an AMD EPYC without AMX, 24 GiB, Python"
        f" {platform.python_version()}, {_versions(args.peers)}.",
        f"{args.images:,} images, {args.images * DETECTIONS:,} detections, {CLASSES} classes;"
        f" medians of {args.rounds} processes, {SLOW} in one. CPU seconds of one thread.",
        "",
        "| | CPU s | quartiles | +MiB | the twelve numbers |",
        "|---|---|---|---|---|",
    ]
    for name in ("metrics", *PEERS, *list(OURS)[1:]):
        times = sorted(one["cpu"] for one in rounds[name])
        low, high = np.percentile(times, [25, 75])
        same = ""
        if "stats" in rounds[name][0]:
            differ = max(
                abs(a - b)
                for one in rounds[name]
                for a, b in zip(one["stats"], expected, strict=True)
            )
            same = f"differ by up to {differ:.1e}" if differ else "the same bits"
        lines.append(
            f"| {OURS.get(name, name)} | {statistics.median(times):.2f} | {low:.2f} to {high:.2f} |"
            f" {statistics.median(one['mib'] for one in rounds[name]):,.0f} | {same} |"
        )
    return "\n".join(lines) + "\n"


def _versions(python: str) -> str:
    code = (
        "from importlib.metadata import version as v;"
        f"print(', '.join(p + ' ' + v(p) for p in ('numpy', {', '.join(map(repr, PEERS))})))"
    )
    answer = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
