"""The loaders of training and evaluation: which batches they yield, in which order.

Batches are made by worker processes or, without any, in this process; the bytes are the same.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import batched
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from runkey import paths
from runkey.data.augment import (
    Augmentation,
    AugmentParams,
    build_augmentation,
    evaluation_size,
)
from runkey.data.cache import CachePlan, cache_file, open_cache, plan_cache, write_cache
from runkey.data.dataset import (
    AugmentedImage,
    Batch,
    BatchMaker,
    GlobalBatch,
    Request,
)
from runkey.data.image_list import IMAGE_LIST, ListedImage, read_image_list
from runkey.data.index import SplitName, index_file, read_index
from runkey.data.sampler import GlobalBatchSampler, is_portrait, max_objects, micro_batches
from runkey.errors import DataError, RunkeyError
from runkey.files import read_plain
from runkey.hashing import sha256_file
from runkey.params import Params
from runkey.progress import progress
from runkey.units import counted

logger = logging.getLogger(__name__)

MOST_WORKERS = 8


@dataclass
class _Queue:
    """The requests of the next pass; torch iterates over it when a pass starts."""

    requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class BatchStream:
    """Makes requested batches in order; worker processes are kept between passes."""

    def __init__(self, maker: BatchMaker, workers: int, prefetch: int, pin_memory: bool) -> None:
        """Set the stream up; worker processes (0: none) start with the first pass.

        Each makes `prefetch` batches ahead. With `pin_memory` and a GPU, batches are page-locked.
        """
        self._queue = _Queue()
        parallel: dict[str, Any] = {}
        if workers:
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            parallel = {
                "num_workers": workers,
                "prefetch_factor": prefetch,
                "persistent_workers": True,
                "multiprocessing_context": context,
                "worker_init_fn": _start_worker,
            }
        self._loader: DataLoader[Batch | RunkeyError] = DataLoader(
            maker,
            batch_size=None,
            sampler=self._queue,
            pin_memory=pin_memory and torch.cuda.is_available(),
            # Without a generator, every pass would draw from the global random state.
            generator=torch.Generator(),
            **parallel,
        )

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield the batch of each request; an earlier pass that is not at its end is over.

        The requests are taken as far ahead as the worker processes make batches.

        Raises:
            DataError: an image cannot be read, or a worker process was killed.
        """
        self._queue.requests = requests
        with _killed_workers_reported():  # a worker may have died since the last pass
            results = iter(self._loader)
        while True:
            with _killed_workers_reported():
                result = next(results, None)
            if result is None:
                return
            if isinstance(result, RunkeyError):
                raise result
            yield result

    def close(self) -> None:
        """End the worker processes; the next pass starts new ones."""
        iterator: Any = self._loader._iterator
        if iterator is not None:  # never without workers
            iterator._shutdown_workers()
            self._loader._iterator = None


_EXHAUSTED = (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
_BROKEN = (ConnectionError, FileNotFoundError)


@contextmanager
def _killed_workers_reported() -> Iterator[None]:
    """Convert the errors that torch raises for a killed worker to a `DataError`."""
    try:
        yield
    # All but the first: it was killed while one of its tensors was being fetched.
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            raise DataError(
                f"loader processes cannot be started ({error.strerror}); give /dev/shm more room"
                " (`docker run --shm-size=4g`), or lower runtime.workers in params.yaml (0: none)"
            ) from error
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        if isinstance(error, OSError) and not isinstance(error, _BROKEN):
            raise
        raise DataError(
            "a loader process was killed, usually because memory or /dev/shm ran out; "
            "lower runtime.workers or runtime.prefetch in params.yaml"
        ) from error


def _start_worker(_: int) -> None:
    """Use one thread, ignore Ctrl-C, which the trainer handles, and end with the trainer.

    A killed trainer cannot end its workers. torch watches the worker's parent instead, but that
    is the fork server, which lives as long as it has workers.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = parent_process()
    assert trainer is not None

    def end_with_trainer() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=end_with_trainer, daemon=True).start()
    # A batch that finds no room in /dev/shm would be dropped with a traceback, and waited for.
    setattr(Queue, "_on_queue_feeder_error", staticmethod(lambda *_: os._exit(1)))  # noqa: B010


def resolve_workers(
    workers: int | Literal["auto"], cached: bool, world_size: int = 1
) -> tuple[int, str]:
    """Choose the number of loader processes of each rank; return it with the reason for the log.

    `workers` is `runtime.workers`; a split that is `cached` needs none.
    """
    if workers != "auto":
        return workers, "runtime.workers"
    if cached:
        return 0, "the images are in the decoded cache"
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // world_size)
    return min(share, MOST_WORKERS), f"{counted(share, 'core')}, at most {MOST_WORKERS} used"


@dataclass(frozen=True)
class TrainLoader:
    """Yields global batches of augmented training images, one per optimizer step."""

    sampler: GlobalBatchSampler
    stream: BatchStream
    micro_batch: int
    """Most images of a forward pass."""
    rank: int
    """This process gets every `world_size`-th image of a global batch, from the `rank`-th on."""
    world_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in every epoch."""
        return -(-len(self.sampler.ids) // self.sampler.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        """Yield this rank's part of an epoch's global batches, from step `start_step` on.

        Each is one or more micro-batches. If the last global batch has fewer images than there
        are ranks, some ranks get an empty one.

        Raises:
            DataError: an image cannot be read, or a worker process was killed.
        """
        grouped = self.sampler.augmentation.data.group_by_aspect
        plan = self.sampler.global_batches(epoch)[start_step:]
        waiting: dict[int, list[Sequence[AugmentedImage]]] = {}
        """The micro-batches of the steps that are requested and not all yielded."""

        def parts(step: int) -> list[Sequence[AugmentedImage]]:
            if step not in waiting:
                own = plan[step][self.rank :: self.world_size]
                waiting[step] = micro_batches(own, self.micro_batch, grouped=grouped)
            return waiting[step]

        steps = range(len(plan))
        batches = self.stream.batches(Request(p, epoch) for step in steps for p in parts(step))
        for step in steps:
            yield tuple(next(batches) for _ in parts(step))
            del waiting[step]

    def close(self) -> None:
        """End the worker processes."""
        self.stream.close()


@dataclass(frozen=True)
class EvalLoader:
    """Yields every image of a split once, resized only, in an order that needs little padding."""

    requests: Sequence[Request]
    stream: BatchStream

    def __iter__(self) -> Iterator[Batch]:
        return self.stream.batches(self.requests)

    def close(self) -> None:
        """End the worker processes."""
        self.stream.close()


def build_train_loader(
    params: Params, root: Path, micro_batch: int, *, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    """Build the loader of a workspace's training split; rank 0 logs the number of workers.

    Raises:
        DataError: there is no index, it holds no image, or an image to cache cannot be read.
    """
    augmentation = build_augmentation(params)
    maker = _maker(params, root, "train", augmentation, makes_cache=rank == 0)
    index = maker.index
    workers, reason = resolve_workers(params.runtime.workers, _in_cache(maker), world_size)
    if rank == 0:
        logger.info(f"training images: {len(index)}; loader processes: {workers} ({reason})")
    sampler = GlobalBatchSampler(augmentation, index.ids, index.sizes, params.training.batch_size)
    stream = BatchStream(maker, workers, params.runtime.prefetch, params.runtime.pin_memory)
    return TrainLoader(sampler, stream, micro_batch, rank, world_size)


def build_eval_loader(params: Params, root: Path, split: SplitName = "val") -> EvalLoader:
    """Build the loader of a split without augmentation, in batches of `evaluate.batch_size`.

    Raises:
        DataError: there is no index, it holds no image, or an image to cache cannot be read.
    """
    maker = _maker(params, root, split, None)
    runtime = params.runtime
    workers, _ = resolve_workers(runtime.workers, _in_cache(maker))
    stream = BatchStream(maker, workers, runtime.prefetch, runtime.pin_memory)
    # Sorted by aspect, then size; landscape and portrait apart if training has it so.
    images = [
        (i, AugmentParams(evaluation_size(params.data, *size)))
        for i, size in enumerate(maker.index.sizes.tolist())
    ]
    images.sort(key=lambda image: (is_portrait(s := image[1].size), s[1] / s[0], s[0]))
    parts = micro_batches(images, params.evaluate.batch_size, grouped=params.data.group_by_aspect)
    return EvalLoader([Request(part) for part in parts], stream)


def _maker(
    params: Params,
    root: Path,
    split: SplitName,
    augmentation: Augmentation | None,
    *,
    makes_cache: bool = True,
) -> BatchMaker:
    """The maker of a split; without augmentation it keeps every box."""
    prepared = root / paths.PREPARED
    path = index_file(prepared, split)
    index = read_index(path)
    if not len(index):
        raise DataError(f"{path}: holds no image; see prepared/report.json for what was dropped")
    plan = plan_cache(params.data, index, training=augmentation is not None)
    maker = BatchMaker(
        index=index,
        folder=root / params.data.path,
        plan=plan,
        cache=None,
        augmentation=augmentation,
        max_objects=max_objects(params) if augmentation else 0,
    )
    if not len(plan.shapes):
        return maker
    file = cache_file(prepared, index, plan)
    cache = open_cache(file, plan, checked=True)
    if cache is None and makes_cache:
        write_cache(file, plan, _decoded(maker, plan, split))
        cache = open_cache(file, plan)
    return replace(maker, cache=cache)


def _in_cache(maker: BatchMaker) -> bool:
    return maker.cache is not None and len(maker.cache) == len(maker.index)


def _decoded(maker: BatchMaker, plan: CachePlan, split: str) -> Iterator[NDArray[np.uint8]]:
    """Decode the images of a plan, in one thread per core; some are ahead of the consumer.

    They are those that `prepare` listed: what is cached outlives a file that was changed since.
    """
    shapes = plan.shapes.tolist()
    path = maker.index.path and maker.index.path.with_name(IMAGE_LIST)
    listed: Mapping[str, ListedImage] = {}
    if path and path.is_file():
        listed = read_image_list(read_plain(path), str(path)).get(split, {})

    def decode(index: int) -> NDArray[np.uint8]:
        height, width = shapes[index]
        pixels = maker.image(index, (height, width)).permute(1, 2, 0).numpy()
        name = maker.index.file(index)
        differs = name in listed and not listed[name].is_of(sha256_file(maker.folder / name))
        if differs or pixels.shape[:2] != (height, width):
            image = maker.folder / name
            raise DataError(f"{image}: not what prepare read; run `dvc repro prepare` again")
        return pixels

    threads = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as pool,
        progress(f"decode {split}", len(shapes), "images") as steps,
    ):
        for part in batched(range(len(shapes)), 8 * threads):
            for pixels in pool.map(decode, part):
                yield pixels
                steps.advance()


def is_cached(params: Params, root: Path, split: SplitName) -> bool:
    """Return True if all images that a training reads of a split are in the decoded cache."""
    prepared = root / paths.PREPARED
    index = read_index(index_file(prepared, split))
    plan = plan_cache(params.data, index, training=split == "train")
    complete = len(plan.shapes) == len(index) > 0
    return complete and open_cache(cache_file(prepared, index, plan), plan) is not None
