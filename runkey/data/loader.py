"""The loaders of training and of evaluation: which batches there are, in which order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from runkey.data.augment import View, build_views, evaluation_size
from runkey.data.cache import open_cache
from runkey.data.dataset import (
    Batch,
    BatchMaker,
    Failure,
    GlobalBatch,
    ImageTable,
    Request,
    image_table,
)
from runkey.data.index import Split, read_index
from runkey.data.sampler import Seen, WindowSampler, micro_batches
from runkey.data.shapes import is_portrait
from runkey.errors import DataError
from runkey.params import Data

# Requests answered in order, by worker processes or in this one.


class _Requests(Dataset["Batch | Failure"]):
    """What a worker process holds."""

    def __init__(self, maker: BatchMaker) -> None:
        self._maker = maker

    def __getitem__(self, request: Request) -> Batch | Failure:
        return self._maker.make_or_fail(request)


class _Queue(Sampler[Request]):
    """The requests of the next pass; set anew for each."""

    def __init__(self) -> None:
        self.requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class BatchStream:
    """Answers requests in order, with 0 or more worker processes that are kept between passes."""

    def __init__(self, maker: BatchMaker, workers: int, prefetch: int, pin_memory: bool) -> None:
        """Start nothing yet.

        Args:
            maker: makes the batches.
            workers: processes; 0: make batches here.
            prefetch: batches that each worker is ahead.
            pin_memory: page-lock the batches, where there is a GPU.
        """
        self._maker = maker
        self._queue = _Queue()
        self._pin = pin_memory and torch.cuda.is_available()
        self._loader: DataLoader[Batch | Failure] | None = None
        if workers:
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._loader = DataLoader(
                _Requests(maker),
                batch_size=None,
                sampler=self._queue,
                num_workers=workers,
                collate_fn=_as_it_is,
                pin_memory=self._pin,
                prefetch_factor=prefetch,
                persistent_workers=True,
                multiprocessing_context=context,
                worker_init_fn=_start_worker,
                # Its own generator: else every pass would draw from the global random state.
                generator=torch.Generator(),
            )

    def answer(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """Yield the batch of each request.

        Raises:
            DataError: an image cannot be read, or a worker process was killed.
        """
        if self._loader is None:
            for request in requests:
                batch = self._maker.make(request)
                yield batch.pin_memory() if self._pin else batch
            return
        self._queue.requests = requests
        with _deaths_told():  # one that died since the last pass
            answers = iter(self._loader)
        for _ in requests:
            with _deaths_told():
                answer = next(answers)
            if isinstance(answer, Failure):
                raise DataError(answer.line)
            yield answer

    def close(self) -> None:
        """End the worker processes; the next pass starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if self._loader is not None and iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None


@contextmanager
def _deaths_told() -> Iterator[None]:
    """Turn the ways in which torch notices a killed worker into one line."""
    try:
        yield
    # The last three: it was killed while a tensor of its was being fetched.
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        raise DataError(
            "a loader process was killed, mostly for want of memory or of /dev/shm: "
            "lower runtime.workers or runtime.prefetch in params.yaml"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """One thread a worker; Ctrl-C is for the trainer, which then ends its workers.

    A trainer that is killed ends nothing.  torch's own watch is over the worker's parent, which is
    the fork server, and that lives as long as it has workers.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = parent_process()
    assert trainer is not None
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: BaseProcess) -> None:
    trainer.join()
    os._exit(1)


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

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
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
