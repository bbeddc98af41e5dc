"""What a proposal of parameters is made from: the data, the machine, the measured speed."""

from __future__ import annotations

import math
import os
import resource
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runkey import paths
from runkey.data.coco import Coco, find_sources, merge_classes, read_coco
from runkey.data.index import Index, index_file, read_classes, read_index
from runkey.data.report import Findings
from runkey.errors import DataError, RunkeyError, TrainingError
from runkey.identity.inputs import Inputs
from runkey.identity.key import make_recipe
from runkey.params import Params
from runkey.units import GIB, counted

if TYPE_CHECKING:
    import torch

_WARM_STEPS = 2
_SECONDS = 2.0
"""Time of the measured steps, after those that warm up."""
_LEAST_STEPS, _MOST_STEPS = 3, 30
_MOST_SECONDS = 10.0
"""After so long one measured step is enough."""


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """The images and objects of a split."""

    sizes: NDArray[np.float64]
    """[images, 2] height and width of the originals, pixels."""
    boxes: NDArray[np.float64]
    """[objects, 4] height and width of each box and of its image, pixels."""
    names: NDArray[np.str_]
    """[objects] class of each box."""
    most_objects: int
    """Objects in the fullest image."""

    @property
    def images(self) -> int:
        """Return the number of images."""
        return len(self.sizes)

    @property
    def objects(self) -> int:
        """Return the number of objects, crowd regions not counted."""
        return len(self.boxes)

    @property
    def classes(self) -> Counter[str]:
        """Count the objects of each class."""
        return Counter(self.names.tolist())

    @property
    def sides(self) -> NDArray[np.float64]:
        """Return sqrt(width x height) of every box, as a part of the image's."""
        heights, widths, image_heights, image_widths = self.boxes.T
        sides: NDArray[np.float64] = np.sqrt(heights * widths / (image_heights * image_widths))
        return sides

    @property
    def median_side(self) -> float:
        """Return the median of `sides`."""
        return float(np.median(self.sides))

    @property
    def size_spread(self) -> float:
        """Return the standard deviation of log(side) within the classes; 0.2: about 20%.

        Blood cells have 0.14, raccoons 0.32, kangaroos 0.49, COCO's objects 0.8.
        """
        logs = np.log(self.sides)
        within = [logs[self.names == name].var() * count for name, count in self.classes.items()]
        return math.sqrt(sum(within) / self.objects)

    def sides_at(self, short_side: int, long_side: int) -> NDArray[np.float64]:
        """Return sqrt(width x height) of every box, pixels, after resizing as `evaluate` does."""
        heights, widths, image_heights, image_widths = self.boxes.T
        low = np.minimum(image_heights, image_widths)
        high = np.maximum(image_heights, image_widths)
        scales = np.minimum(short_side / low, long_side / high)
        sides: NDArray[np.float64] = scales * np.sqrt(heights * widths)
        return sides


@dataclass(frozen=True, slots=True)
class DataFacts:
    """A data set, before or after `prepare`."""

    train: SplitFacts
    """All images, if the data set has one JSON and is not prepared yet."""
    val: SplitFacts | None
    test: SplitFacts | None
    read: str
    """What this was read from."""

    @property
    def judged(self) -> SplitFacts | None:
        """Return the split that the result is measured on, if it is known."""
        return self.test or self.val

    @property
    def median_size(self) -> tuple[int, int]:
        """Return the median height and width of the training images, pixels."""
        height, width = np.median(self.train.sizes, axis=0)
        return round(height), round(width)


@dataclass(frozen=True, slots=True)
class Speed:
    """Training steps that were run on this machine."""

    images_per_second: float
    threads: int
    """Of torch on the CPU."""
    peak_bytes: int
    """Of the process on a CPU, of torch's allocator on a GPU."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What training can use here."""

    gpu: str
    """Name of the GPU; empty if there is none."""
    cores: int
    memory_bytes: int
    """Free memory of the device."""
    busy_cores: float
    """Of the cores, those that other programs use: the load of the last minute."""
    disk_bytes: int
    """Free space of the workspace."""

    def __str__(self) -> str:
        gpu = self.gpu or "no GPU"
        return (
            f"{gpu}, {counted(self.cores, 'CPU core')}, {self.memory_bytes / GIB:.1f} GiB of memory"
            f" and {self.disk_bytes / GIB:.0f} GiB of disk are free"
        )


def survey_data(root: Path, params: Params) -> DataFacts:
    """Read prepared/ if it is of the present data, else the JSON files below `data.path`.

    Raises:
        DataError: there is no data set, or it has no object to learn.
    """
    prepared = root / paths.PREPARED
    facts = None
    if index_file(prepared, "train").is_file() and _is_current(root, params):
        names = [one.name for one in read_classes(prepared / "classes.json")]
        files = (index_file(prepared, split) for split in ("train", "val", "test"))
        train, val, *test = (_facts_of(read_index(one), names) for one in files if one.is_file())
        facts = DataFacts(train, val, test[0] if test else None, f"{paths.PREPARED}/")
    else:
        facts = _read_data(root, params)
    if not facts.train.objects:
        raise DataError(f"{facts.read}: no object to learn")
    if facts.val and not facts.val.objects:
        raise DataError(f"{facts.read}: no object in val, on which AP is measured")
    return facts


def _is_current(root: Path, params: Params) -> bool:
    """Return True if prepared/ was made from the tracked data, whatever the parameters."""
    with suppress(RunkeyError):
        inputs = Inputs(
            root, params, make_recipe("prepare", root, params), paths.home_of(paths.store_root())
        )
        inputs.check("none")
        return True
    return False


def _facts_of(index: Index, names: list[str]) -> SplitFacts:
    own, counts, sizes = ~index.crowd, index.object_counts(), index.sizes.astype(np.float64)
    boxes = np.concatenate((index.boxes_xywh[own][:, [3, 2]], sizes.repeat(counts, axis=0)), axis=1)
    classes = np.array(names, dtype=str)[index.labels[own]]
    return SplitFacts(sizes, boxes, classes, int(counts.max(initial=0)))


def _split(
    sizes: list[tuple[int, int]],
    boxes: list[tuple[float, float, int, int]],
    names: list[str],
    most_objects: int,
) -> SplitFacts:
    return SplitFacts(
        np.array(sizes, dtype=float).reshape(-1, 2),
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array(names, dtype=str),
        most_objects,
    )


def _read_data(root: Path, params: Params) -> DataFacts:
    data = params.data.path.rstrip("/")
    findings = Findings(params.data.checks, "")
    sources = find_sources(root / params.data.path, data)
    read = [one for source in sources if (one := read_coco(source, findings)) is not None]
    names = {one.id: one.name for one in merge_classes(read, findings)}
    parts: dict[str, SplitFacts] = {one.source.split: _facts_of_coco(one, names) for one in read}
    train = parts.pop("train", None) or parts.pop("data")
    shown = " and ".join(source.shown_json for source in sources)
    test = parts.get("test")
    test = test if test and test.objects else None  # as `prepare` has it
    return DataFacts(train, parts.get("val"), test, shown)


def _facts_of_coco(coco: Coco, names: dict[int, str]) -> SplitFacts:
    """Count what `prepare` will most likely keep: boxes of four numbers with an area."""
    sizes = {one.id: (one.height, one.width) for one in coco.images}
    boxes, classes, counts = [], [], Counter[int]()
    for one in coco.annotations:
        if one.crowd or one.image_id not in sizes or one.category_id not in names:
            continue
        with suppress(TypeError, ValueError, OverflowError):
            _, _, width, height = map(float, one.bbox)
            if 0 < width < np.inf and 0 < height < np.inf:
                rows, columns = sizes[one.image_id]
                boxes.append((min(height, rows), min(width, columns), rows, columns))
                classes.append(names[one.category_id])
                counts[one.image_id] += 1
    return _split(list(sizes.values()), boxes, classes, max(counts.values(), default=0))


def survey_machine(root: Path, params: Params) -> Machine:
    """Return what training can use here; imports torch."""
    import torch

    from runkey.memory.measure import memory_budget
    from runkey.training.device import choose_device

    device, _ = choose_device(params.runtime.device)
    return Machine(
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        cores=len(os.sched_getaffinity(0)),
        busy_cores=os.getloadavg()[0],
        memory_bytes=memory_budget(params.memory.budget_gib, device, 0).bytes,
        disk_bytes=shutil.disk_usage(root).free,
    )


def measure_speed(params: Params, facts: DataFacts) -> Speed:
    """Run some training steps with random weights on images of the data's typical size.

    Reading images and evaluating are not measured.

    Raises:
        TrainingError: not even one image at once fits into memory.
    """
    import torch

    from runkey.training.device import choose_device

    device, _ = choose_device(params.runtime.device)
    images = params.training.batch_size
    while True:
        try:
            seconds = statistics.median(_step_seconds(params, facts, device, images))
            break
        except torch.OutOfMemoryError:
            if images == 1:
                short, long = max(params.data.short_sides), params.data.long_side
                raise TrainingError(
                    f"a training step of one image at data.short_sides {short}, data.long_side"
                    f" {long} does not fit on {torch.cuda.get_device_name(device)}; free memory on"
                    " it, or train on the CPU with runtime.device: cpu"
                ) from None
            images = -(-images // 2)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_of_process()
    rate = params.training.batch_size / seconds
    return Speed(rate, torch.get_num_threads(), peak)


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _padded_shape(params: Params, train: SplitFacts) -> tuple[int, int]:
    """Return the median height and width of batches: all are as large as their largest image."""
    from runkey.data.augment import resized_size

    data, size = params.data, params.training.batch_size
    short = round(statistics.mean(data.short_sides))
    shapes = [resized_size(round(h), round(w), short, data.long_side) for h, w in train.sizes]
    if data.group_by_aspect:
        tall = [one for one in shapes if one[0] > one[1]]
        wide = [one for one in shapes if one[0] <= one[1]]
        shapes = max(tall, wide, key=len)
    batches = [np.max(shapes[at : at + size], axis=0) for at in range(0, len(shapes), size)]
    height, width = np.median(np.array(batches), axis=0)
    return round(height), round(width)


def _step_seconds(
    params: Params, facts: DataFacts, device: torch.device, micro_batch: int
) -> Iterator[float]:
    """Yield the seconds of each measured step."""
    import torch

    from runkey.memory.predict import batch_fields
    from runkey.memory.trace.events import MicroBatch
    from runkey.memory.trace.record import synthetic_batch
    from runkey.pipeline.step_factory import build_step

    train, shape = facts.train, _padded_shape(params, facts.train)
    objects = max(1, round(train.objects / train.images))
    fields = batch_fields(params, len(train.classes))
    left, sizes = params.training.batch_size, []
    while left > 0:
        sizes.append(MicroBatch(min(left, micro_batch), *shape, objects))
        left -= micro_batch
    step = build_step(params, len(train.classes), device).step
    batch = tuple(synthetic_batch(one, fields) for one in sizes)
    began, measured = time.monotonic(), 0
    for number in range(_WARM_STEPS + _MOST_STEPS):
        started = time.monotonic()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number == _WARM_STEPS - 1:
            warm = time.monotonic()
        if number < _WARM_STEPS and time.monotonic() - began < _MOST_SECONDS:
            continue
        yield time.monotonic() - started
        measured += 1
        enough = measured >= _LEAST_STEPS and time.monotonic() - warm > _SECONDS
        if enough or time.monotonic() - began > _MOST_SECONDS:
            return
