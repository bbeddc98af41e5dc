"""The loaders of training and of evaluation: which batches there are, in which order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from runkey.data.augment import View, build_views, evaluation_size
from runkey.data.batch import Batch, Window
from runkey.data.cache import open_cache
from runkey.data.dataset import BatchMaker, ImageTable, Request, image_table
from runkey.data.index import Split, read_index
from runkey.data.sampler import Seen, WindowSampler, micro_batches
from runkey.data.shapes import is_portrait
from runkey.data.stream import BatchStream
from runkey.errors import DataError
from runkey.params import Data

MOST_WORKERS = 8


def resolve_workers(
    workers: int | Literal["auto"], cached: bool, world_size: int = 1
) -> tuple[int, str]:
    """The number of loader processes, and why, for the log.

    Args:
        workers: `runtime.workers`.
        cached: whether the split's decoded images are in the cache.
        world_size: processes that train together; each has loader processes of its own.
    """
    if workers != "auto":
        return workers, "runtime.workers"
    if cached:
        return 0, "the images are in the decoded cache"
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // world_size)
    return min(share, MOST_WORKERS), f"{share} cores, at most {MOST_WORKERS} used"


class TrainLoader:
    """Windows of augmented training images: one window is one optimizer step."""

    def __init__(
        self,
        sampler: WindowSampler,
        stream: BatchStream,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Put a loader together; `build_train_loader` does so from parameters.

        Args:
            sampler: deals the images of an epoch into windows.
            stream: makes the batches.
            micro_batch: most images of a forward pass.
            rank: which share of each window is ours.
            world_size: processes that share each window.
        """
        self._sampler = sampler
        self._stream = stream
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size

    @property
    def steps_per_epoch(self) -> int:
        """Windows in each epoch, the last and smaller one included."""
        return self._sampler.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Window]:
        """Yield the windows of an epoch, from its window `start_step` on.

        A window is one batch or more of at most `micro_batch` images.  With several ranks each
        gets its part of every window; a last window with fewer images than ranks gives some of
        them an empty one.

        Raises:
            DataError: an image cannot be read, or a worker process was killed.
        """
        windows = [self._cut(epoch, w) for w in self._sampler.windows(epoch)[start_step:]]
        batches = self._stream.answer([request for window in windows for request in window])
        for window in windows:
            yield tuple(next(batches) for _ in window)

    def _cut(self, epoch: int, window: Sequence[Seen]) -> list[Request]:
        ours = window[self._rank :: self._world_size]
        runs = micro_batches(ours, self._micro_batch, grouped=self._sampler.group_by_aspect)
        return [_request(run, epoch) for run in runs]

    def close(self) -> None:
        """End the worker processes."""
        self._stream.close()


class EvalLoader:
    """Every image of a split once, unchanged but for its size, in an order that pads little."""

    def __init__(self, requests: Sequence[Request], stream: BatchStream) -> None:
        """Put a loader together; `build_eval_loader` does so from parameters."""
        self._requests = requests
        self._stream = stream

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        return self._stream.answer(self._requests)

    def close(self) -> None:
        """End the worker processes."""
        self._stream.close()


def build_train_loader(
    data: Data,
    *,
    prepared: Path,
    root: Path,
    seed: int,
    batch_size: int,
    micro_batch: int,
    max_objects: int = 0,
    workers: int | Literal["auto"] = "auto",
    prefetch: int = 4,
    pin_memory: bool = True,
    rank: int = 0,
    world_size: int = 1,
    say: Callable[[str], None] | None = None,
) -> TrainLoader:
    """The loader of the training split.

    Args:
        data: the parameters.
        prepared: prepare's output folder.
        root: the workspace, which `data.path` is relative to.
        seed: the run's seed.
        batch_size: images of an optimizer step.
        micro_batch: most images of a forward pass.
        max_objects: boxes that the model can take of one image (its queries); 0: any number.
            `data.max_objects` holds too, where it is smaller.
        workers: loader processes, or auto.
        prefetch: batches that each worker is ahead.
        pin_memory: page-lock batches, where there is a GPU.
        rank: this process among those that train together.
        world_size: how many train together.
        say: told how many workers there are and why.

    Raises:
        DataError: there is no index, or it holds no image, or its cache is damaged.
    """
    table = _read_table(prepared, "train")
    cache = open_cache(prepared, "train")
    views = build_views(data, seed)
    limits = [limit for limit in (data.max_objects, max_objects) if limit]
    maker = BatchMaker(
        table=table,
        folder=root / data.path,
        cache=cache,
        views=views,
        min_visible=data.augment.min_visible,
        max_objects=min(limits, default=0),
    )
    count, reason = resolve_workers(workers, cache is not None, world_size)
    if say is not None:
        say(f"training images: {len(table)}; loader processes: {count} ({reason})")
    sampler = WindowSampler(views, table.ids, table.sizes, batch_size, data.group_by_aspect)
    stream = BatchStream(maker, count, prefetch, pin_memory)
    return TrainLoader(sampler, stream, micro_batch, rank, world_size)


def build_eval_loader(
    data: Data,
    *,
    prepared: Path,
    root: Path,
    split: Split = "val",
    batch_size: int,
    max_objects: int = 0,
    workers: int | Literal["auto"] = "auto",
    prefetch: int = 4,
    pin_memory: bool = True,
) -> EvalLoader:
    """The loader of a split without augmentation; arguments as for `build_train_loader`.

    Raises:
        DataError: there is no index, or it holds no image, or its cache is damaged.
    """
    table = _read_table(prepared, split)
    cache = open_cache(prepared, split)
    maker = BatchMaker(
        table=table,
        folder=root / data.path,
        cache=cache,
        views=None,
        min_visible=0.0,
        max_objects=max_objects,
    )
    count, _ = resolve_workers(workers, cache is not None)
    stream = BatchStream(maker, count, prefetch, pin_memory)
    return EvalLoader(_evaluation_requests(data, table, batch_size), stream)


def _evaluation_requests(data: Data, table: ImageTable, batch_size: int) -> list[Request]:
    """Batches sorted by aspect, then size; landscape and portrait apart if training has it so."""
    views = [View(evaluation_size(data, *size)) for size in table.sizes]

    def key(i: int) -> tuple[bool, float, int]:
        height, width = views[i].size
        return is_portrait(views[i].size), width / height, height

    order = [(i, views[i]) for i in sorted(range(len(table)), key=key)]
    runs = micro_batches(order, batch_size, grouped=data.group_by_aspect)
    return [_request(run, None) for run in runs]


def _request(run: Sequence[Seen], epoch: int | None) -> Request:
    return Request(tuple(i for i, _ in run), tuple(view for _, view in run), epoch)


def _read_table(prepared: Path, split: Split) -> ImageTable:
    path = prepared / f"{split}.json"
    records = read_index(path)
    if not records:
        raise DataError(f"{path}: holds no image; see prepared/report.json for what was dropped")
    return image_table(records)
