"""Requests answered in order, by worker processes or in this one.

Workers come from a fork server: a clean process without threads, CUDA or open locks.  (Forking this
process would copy torch's and the tracker's threads half way through what they hold.)  They live as
long as the loader.  What a batch holds does not depend on them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from runkey.data.batch import Batch
from runkey.data.dataset import BatchMaker, Failure, Request
from runkey.errors import DataError


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
