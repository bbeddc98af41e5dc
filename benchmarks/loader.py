"""CPU time a training image takes in the loader, beside the reference DETR's loader.

    python -m benchmarks.loader --data COCO --detr .reference/detr [--rounds 7]

COCO holds annotations/instances_train*.json and its images; .reference/detr is made by `make
reference`.  One process with one thread makes the same images by both loaders in turn, at the sizes
and crops of preset coco-detr-r50, in batches of 16.  Both read the file, decode, flip, crop, resize
and pad.  The reference also converts to float and normalises, which runkey does on the device: it
is timed apart.  `results/loader.md` is written anew.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from runkey.data.dataset import normalise
from runkey.data.loader import BatchStream, TrainLoader, build_train_loader
from runkey.data.prepare import prepare
from runkey.params import load_params

RESULT = Path(__file__).parent / "results" / "loader.md"
PRESET = Path(__file__).parents[1] / "presets" / "coco-detr-r50.yaml"
_BATCH = 16
Images = Iterator[int]
"""Numbers of images of the batches, which are made when they are asked for."""


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--detr", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loaders = _ours(chosen.data.resolve(), Path(folder))
        detr = _reference(chosen.data, chosen.detr)
        text = _measured(detr, loaders, chosen.rounds)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


def _ours(data: Path, root: Path) -> dict[str, TrainLoader]:
    """The loaders without and with the decoded cache."""
    params = load_params(PRESET)
    changed = {"path": str(data), "cache_gib": 8.0}
    params = params.model_copy(
        update={
            "data": params.data.model_copy(update=changed),
            "training": params.training.model_copy(update={"batch_size": _BATCH}),
            "runtime": params.runtime.model_copy(update={"workers": 0}),
        }
    )
    prepare(params.data, root, root / "prepared", params.model.num_queries)
    cached = build_train_loader(params, root, _BATCH)
    maker: Any = cached.stream._loader.dataset
    assert maker.cache is not None
    stream = BatchStream(replace(maker, cache=None), 0, 1, pin_memory=False)
    return {"from files": replace(cached, stream=stream), "from the cache": cached}


def _reference(data: Path, repository: Path) -> Callable[[int], Images]:
    """The reference's dataset and its collate function, as torch's loader calls them."""
    sys.path.insert(0, str(repository.resolve()))
    coco, misc = map(importlib.import_module, ("datasets.coco", "util.misc"))
    (file,) = (data / "annotations").glob("instances_train*.json")
    folder = data / file.stem.removeprefix("instances_")
    dataset = coco.CocoDetection(folder, file, coco.make_coco_transforms("train"), False)

    def batches(epoch: int) -> Images:
        random.seed(epoch)
        torch.manual_seed(epoch)
        order = random.sample(range(len(dataset)), len(dataset))
        for start in range(0, len(order), _BATCH):
            yield len(misc.collate_fn([dataset[i] for i in order[start : start + _BATCH]])[1])

    return batches


def _measured(detr: Callable[[int], Images], ours: dict[str, TrainLoader], rounds: int) -> str:
    seconds: dict[str, list[float]] = {}

    def measure(name: str, batches: Images) -> None:
        start = time.process_time()
        images = sum(batches)
        seconds.setdefault(name, []).append((time.process_time() - start) / images)

    normalised = _Timer()
    for epoch in range(rounds + 1):
        measure("the reference", detr(epoch))
        for name, loader in ours.items():
            measure(name, (len(batch) for step in loader.epoch(epoch) for batch in step))
        measure("with normalising", normalised.images(ours["from files"], epoch))
    rows = {name: values[1:] for name, values in seconds.items()}  # the first one warms up
    base = rows["the reference"]
    lines = ["| loader | ms an image | times the reference's speed (quartiles) |", "|---|---|---|"]
    for name, values in rows.items():
        ratios = [one / value for one, value in zip(base, values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(
            f"| {name} | {1000 * statistics.median(values):.2f} | {middle:.2f}"
            f" ({low:.2f} to {high:.2f}) |"
        )
    return _HEAD.format(
        date=date.today(), cores=os.cpu_count(), python=platform.python_version(),
        torch=torch.__version__, rounds=rounds, table="\n".join(lines),
    )  # fmt: skip


class _Timer:
    def images(self, loader: TrainLoader, epoch: int) -> Images:
        for step in loader.epoch(epoch):
            for batch in step:
                normalise(batch)
                yield len(batch)


_HEAD = """# The loader

`python -m benchmarks.loader --data COCO --detr .reference/detr`, {date}; {cores} cores of an AMD
EPYC, processor time of one thread, Python {python}, torch {torch}. COCO images at the sizes and
crops of preset coco-detr-r50, batches of 16; {rounds} rounds, both loaders in turn; medians.

{table}
"""


if __name__ == "__main__":
    main()
