"""Making training batches of COCO's JPEG files: against the reference DETR's data set."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.reference import Reference
from benchmarks.speed.pairs import OURS, Row, check, time_in_turn
from benchmarks.speed.peers import DETR
from benchmarks.speed.step import parameters
from runkey import paths
from runkey.data.dataset import GlobalBatch, normalise
from runkey.data.decode import decode_rgb
from runkey.data.loader import build_eval_loader, build_train_loader
from runkey.data.prepare import prepare
from runkey.params import Params, override

CACHED, NORMALISED, CACHED_NORMALISED = (
    f"{OURS}, cache",
    f"{OURS}, normalised on the CPU",
    f"{OURS}, cache, normalised on the CPU",
)
BATCH = 2
_ROUND_IMAGES = 40
_MOST_DIFFERENCE = 0.02
"""Mean absolute difference of normalised pixels; one grey level is 0.017."""


def measure_loader(reference: Reference, images: Path, rounds: int) -> Iterator[Row]:
    """Time batches of two, augmented as the reference's training is (480 to 800 pixels).

    Args:
        reference: with its data set.
        images: a folder with COCO's `annotations/` and `train2017/`.
        rounds: of 40 images for each contestant.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.symlink_to(images.resolve())
        files = _workspace(Path(folder, "files"), data, cache_gib=0.0)
        cached = _workspace(Path(folder, "cache"), data, cache_gib=16.0)
        row = {
            OURS: _ours(*files),
            CACHED: _ours(*cached),
            DETR: _reference(reference, images),
            NORMALISED: _ours(*files, on_cpu=True),
            CACHED_NORMALISED: _ours(*cached, on_cpu=True),
            "runkey's decoding alone": _decoding(images),
        }
        name = "a training image of COCO's JPEG files"
        difference = {DETR: _pixel_difference(reference, images, *files)}
        agreement = check(name, difference, _MOST_DIFFERENCE)
        times = time_in_turn(row, rounds)
    each = {name: [ms / _ROUND_IMAGES for ms in taken] for name, taken in times.items()}
    yield Row(name, each, (DETR,), agreement)


def _workspace(root: Path, data: Path, *, cache_gib: float) -> tuple[Params, Path]:
    root.mkdir()
    (root / "data").symlink_to(data)
    changes = {"data.cache_gib": cache_gib, "runtime.workers": 0, "training.batch_size": BATCH}
    params = parameters(**changes)
    prepare(params.data, root, root / paths.PREPARED, params.model.num_queries)
    return params, root


def _ours(params: Params, root: Path, *, on_cpu: bool = False) -> Callable[[], None]:
    """Batches as the training step takes them: uint8, which the device normalises."""
    loader = build_train_loader(params, root, BATCH)
    steps = _endless(loader.epoch)

    def make() -> None:
        for (batch,) in islice(steps, _ROUND_IMAGES // BATCH):
            if on_cpu:
                normalise(batch)

    return make


def _decoding(images: Path) -> Callable[[], None]:
    """The least that a batch without a cache takes: its files, read and decoded."""
    files = cycle(sorted((images / "train2017").glob("*.jpg")))

    def make() -> None:
        for file in islice(files, _ROUND_IMAGES):
            decode_rgb(file, 0, mirror=False)

    return make


def _endless(epoch: Callable[[int], Iterator[Any]]) -> Iterator[GlobalBatch]:
    return (step for number in count() for step in epoch(number))


def _reference(reference: Reference, images: Path) -> Callable[[], None]:
    data = _reference_data(reference, images, "train")
    rng = random.Random(0)
    order = _endless(lambda _: iter(rng.sample(range(len(data)), len(data))))

    def make() -> None:
        for _ in range(_ROUND_IMAGES // BATCH):
            reference.misc.collate_fn([data[index] for index in islice(order, BATCH)])

    return make


def _reference_data(reference: Reference, images: Path, purpose: str) -> Any:
    transforms = reference.coco.make_coco_transforms(purpose)
    annotations = images / "annotations" / "instances_train2017.json"
    with redirect_stdout(StringIO()):  # pycocotools prints its progress
        return reference.coco.CocoDetection(
            images / "train2017", annotations, transforms=transforms, return_masks=False
        )


def _pixel_difference(reference: Reference, images: Path, params: Params, root: Path) -> float:
    """Largest of ten images' mean absolute differences, resized to 800 pixels as in evaluation."""
    data = _reference_data(reference, images, "val")
    places = {image_id: index for index, image_id in enumerate(data.ids)}
    single = override(params, {"evaluate.batch_size": 1, "data.short_sides": [800]})
    worst = 0.0
    for batch in islice(build_eval_loader(single, root, "train"), 10):
        ours = normalise(batch)[0][0]
        theirs = data[places[batch.image_ids[0]]][0]
        if ours.shape != theirs.shape:
            raise ValueError(f"image {batch.image_ids[0]}: {ours.shape} and {theirs.shape}")
        worst = max(worst, float((ours - theirs).abs().mean()))
    return worst
