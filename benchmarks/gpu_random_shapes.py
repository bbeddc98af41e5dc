"""G2: training at random census shapes under a cap, with the micro-batch that the tool chooses.

    python -m benchmarks.gpu_random_shapes predict predicted     # anywhere, a minute
    python -m benchmarks.gpu_random_shapes run predicted FOLDER  # on a GPU, three minutes

`predict` writes predicted/memory.json, as `profile_memory` does.  `run` caps the allocator at 8 GiB
and at 16 GiB, less what the tool spares; takes the largest micro-batch whose bound is below; trains
on batches of the census with the worst in their middle, 1,000 steps in all; and tries larger
micro-batches on 40 steps of the same kind until one fails.  FOLDER/gpu_random_shapes.json must say:
no step out of memory, no retry of the allocator, at most one larger micro-batch that would have
held.  Both run without mlflow, dvc and pycocotools.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runkey.data.index import ImageRecord
from runkey.memory.batch_shapes import BatchShapes, sample_steps, shape_statistics
from runkey.memory.choose import largest_fitting
from runkey.memory.measure import spare_bytes
from runkey.memory.predict import (
    MODEL,
    MemoryModel,
    batch_fields,
    predict,
    read_model,
    write_model,
)
from runkey.memory.trace.events import MicroBatch
from runkey.memory.trace.record import synthetic_batch
from runkey.params import Params, load_params, override
from runkey.pipeline.step_factory import build_step, step_factory
from runkey.training.device import choose_device
from runkey.units import GIB, MIB

PRESET = Path(__file__).parents[1] / "presets" / "coco-detr-r50.yaml"
BUDGETS_GIB = (8, 16)
_LARGER, _TRIED = 3, 40
"""Larger micro-batches that are tried, and steps of each."""
_FAULTS = ("ooms", "alloc_retries")
CLASSES = 91
MOST = 64
# The most frequent sizes of COCO 2017's training images (width, height), and about how many of a
# hundred images have each; from its public annotations.
SIZES = {
    (640, 480): 25, (640, 427): 20, (640, 426): 8, (480, 640): 9, (427, 640): 5, (500, 375): 5,
    (640, 425): 4, (640, 428): 3, (612, 612): 3, (640, 640): 3, (500, 333): 3, (640, 360): 3,
    (426, 640): 2, (375, 500): 2, (640, 512): 2, (333, 500): 1, (640, 400): 1, (425, 640): 1,
}  # fmt: skip
IMAGES = 4000


def parameters() -> Params:
    """DETR-R50 on COCO as its authors train it, in bf16; one forward pass a step."""
    params = load_params(PRESET)
    return override(params, {"training.precision": "bf16", "training.batch_size": MOST})


def records() -> list[ImageRecord]:
    """An index like COCO's; no image is ever opened."""
    rng = np.random.default_rng(0)
    sizes = list(SIZES)
    shares = np.array([SIZES[size] for size in sizes], dtype=float)
    chosen = rng.choice(len(sizes), IMAGES, p=shares / shares.sum())
    counts = np.minimum(1 + rng.geometric(1 / 7.3, IMAGES), 93)
    return [
        _record(number + 1, *sizes[which], int(count), rng)
        for number, (which, count) in enumerate(zip(chosen, counts, strict=True))
    ]


def _record(
    number: int, width: int, height: int, boxes: int, rng: np.random.Generator
) -> ImageRecord:
    corners = rng.uniform(0, 0.7, (boxes, 2)) * (width, height)
    sides = rng.uniform(0.05, 0.3, (boxes, 2)) * (width, height)
    return ImageRecord(
        id=number,
        file=f"{number}.jpg",
        width=width,
        height=height,
        rotate=0,
        mirror=False,
        boxes_xywh=tuple(map(tuple, np.concatenate((corners, sides), axis=1).tolist())),
        labels=(0,) * boxes,
        areas=tuple(sides.prod(axis=1).tolist()),
        crowd=(False,) * boxes,
        annotation_ids=tuple(range(boxes)),
    )


def sampled(params: Params, images: int, count: int) -> list[tuple[MicroBatch, ...]]:
    """Sample steps of one micro-batch of `images` images, as the training sampler does."""
    params = override(params, {"training.batch_size": images})
    return sample_steps(params, records(), images, count, params.seed)


def write_prediction(folder: Path) -> None:
    """memory.json of the training that `run` does, as on a machine without a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    params = parameters()
    shapes = BatchShapes(
        statistics=shape_statistics(params, records()),
        statistics_under=lambda other: shape_statistics(other, records()),
        sample=lambda images, count: sampled(params, images, count),
        num_classes=CLASSES,
    )
    write_model(folder, predict(params, shapes, lambda other: step_factory(other, CLASSES)).model)


def run(model: MemoryModel, budget_gib: float, steps: int, seconds: float) -> dict[str, Any]:
    """Train under a cap; what the allocator says of it."""
    device, _ = choose_device("cuda")
    budget = round(budget_gib * GIB)
    room = budget - spare_bytes(budget)
    total = torch.cuda.mem_get_info(device)[1]
    images = largest_fitting(model.gpu.upper, MOST, room)
    torch.cuda.set_per_process_memory_fraction(room / total, device)
    trained = _train(_steps(model, images, steps), device, seconds)
    larger = {}
    for more in range(images + 1, images + _LARGER + 1):
        larger[more] = _train(_steps(model, more, _TRIED), device, seconds)
        if not larger[more]["held"]:
            break
    held = sum(result["held"] for result in larger.values())
    return {
        "budget_gib": budget_gib,
        "room_bytes": room,
        "images": images,
        "predicted_bytes": model.gpu.allocated_bytes[images - 1],
        "upper_bytes": model.gpu.upper(images),
        "trained": trained,
        "larger": larger,
        "larger_that_held": held,
        "passed": trained["held"] and trained["steps"] == steps and held <= 1,
    }


def _steps(model: MemoryModel, images: int, steps: int) -> list[tuple[MicroBatch, ...]]:
    """Steps of the census, the worst batch in their middle."""
    windows = sampled(parameters(), images, steps)[:steps]
    worst = MicroBatch(images, *model.shapes.worst_of(images), model.shapes.objects[0])
    return [*windows[: steps // 2], (worst,), *windows[steps // 2 + 1 :]]


def _train(
    windows: Sequence[tuple[MicroBatch, ...]], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Optimizer steps of a fresh model; ends early when time or memory is out."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    params, done = parameters(), 0
    fields = batch_fields(params, CLASSES)
    start = time.perf_counter()
    try:
        step = build_step(params, CLASSES, device).step
        for window in windows:
            step(tuple(synthetic_batch(one, fields) for one in window))
            done += 1
            if time.perf_counter() - start > seconds:
                break
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        print(f"out of memory after {done} steps")
    after = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    # A step that runs out is cut and tried again, so no error comes of it; the allocator counts.
    faults = {name: after[f"num_{name}"] - before[f"num_{name}"] for name in _FAULTS}
    return {
        "steps": done,
        "seconds": round(time.perf_counter() - start, 1),
        **faults,
        "held": not any(faults.values()),
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "outside_bytes": total - free - torch.cuda.memory_reserved(device),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["predict", "run"])
    parser.add_argument("predicted", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("benchmarks/results/gpu"))
    parser.add_argument("--steps", type=int, default=1000, help="half of them under each cap")
    parser.add_argument("--seconds", type=float, default=80, help="most for each cap's steps")
    chosen = parser.parse_args()
    if chosen.what == "predict":
        write_prediction(chosen.predicted)
        return
    choose_device("cuda")
    model = read_model(chosen.predicted / MODEL)
    results = []
    for budget in BUDGETS_GIB:
        results.append(run(model, budget, chosen.steps // len(BUDGETS_GIB), chosen.seconds))
        print(_line(results[-1]))
        content = {
            "device": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "expandable": any(one["is_expandable"] for one in torch.cuda.memory_snapshot()),
            "passed": all(result["passed"] for result in results),
            "caps": results,
        }
        # After each one: a run that is cut short leaves what it has.
        chosen.folder.mkdir(parents=True, exist_ok=True)
        path = chosen.folder / "gpu_random_shapes.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _line(result: dict[str, Any]) -> str:
    trained = result["trained"]
    return (
        f"{result['budget_gib']} GiB: {result['images']} images, {trained['steps']} steps in "
        f"{trained['seconds']} s, {trained['ooms']} times out of memory, "
        f"{trained['alloc_retries']} retries; "
        f"allocated {trained['allocated_bytes'] / MIB:.0f} MiB "
        f"(predicted {result['predicted_bytes'] / MIB:.0f}), "
        f"reserved {trained['reserved_bytes'] / MIB:.0f} (at most {result['upper_bytes'] / MIB:.0f}"
        f"); {result['larger_that_held']} larger micro-batches held; "
        f"{'passed' if result['passed'] else 'FAILED'}"
    )


if __name__ == "__main__":
    main()
