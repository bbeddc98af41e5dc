"""Tiny prepared folders: real images, a real index, made without the prepare stage."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runkey.data.dataset import Batch, GlobalBatch
from runkey.data.index import ImageRecord, write_index
from runkey.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_train_loader
from runkey.params import Augment, Data, Model, Params, Runtime, Training
from runkey.params.schema import Evaluate


@pytest.fixture
def plain() -> Augment:
    """No augmentation."""
    return Augment(flip_probability=0, zoom=0, aspect=0, shift=0, brightness=0, contrast=0)


@pytest.fixture
def make_record() -> Callable[..., ImageRecord]:
    """A record of an image of `size` (height, width) with some boxes inside it."""
    return _record


def _record(id_: int, size: tuple[int, int] = (60, 80), boxes: int = 1, **changes) -> ImageRecord:
    height, width = size
    xywh = tuple(
        (float(i % width // 2), float(i % height // 2), width / 4, height / 4) for i in range(boxes)
    )
    values = {
        "id": id_,
        "file": f"images/{id_}.png",
        "width": width,
        "height": height,
        "rotate": 0,
        "mirror": False,
        "boxes_xywh": xywh,
        "labels": tuple(i % 3 for i in range(boxes)),
        "areas": tuple(w * h for _, _, w, h in xywh),
        "crowd": (False,) * boxes,
        "annotation_ids": tuple(1000 * id_ + i for i in range(boxes)),
    }
    return ImageRecord(**values | changes)


@dataclass(frozen=True)
class Workspace:
    """A workspace with data/ and prepared/."""

    root: Path

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    def write(self, records: list[ImageRecord], split: str = "train") -> None:
        """Write the index, and noise as an image where there is no file yet."""
        write_index(self.prepared / f"{split}.safetensors", records)
        for record in records:
            path = self.root / "data" / record.file
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                sides = (record.height, record.width)[:: -1 if record.rotate % 180 else 1]
                shape = (*sides, 3)
                pixels = np.random.default_rng(record.id).integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(path)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "prepared").mkdir()
    return Workspace(tmp_path)


def loader_params(
    data: Data,
    *,
    seed: int = 1,
    batch_size: int = 4,
    workers: int = 0,
    prefetch: int = 4,
    max_objects: int = 1000,
    cached: bool = False,
) -> Params:
    """Parameters of a loader, without decoded cache unless `cached`; others have their defaults."""
    if not cached:
        data = data.model_copy(update={"cache_gib": 0.0})
    return Params(
        lr=1e-3,
        seed=seed,
        data=data,
        model=Model(num_queries=max_objects),
        training=Training(batch_size=batch_size),
        evaluate=Evaluate(batch_size=batch_size),
        runtime=Runtime(workers=workers, prefetch=prefetch),
    )


@pytest.fixture
def train_loader(workspace: Workspace) -> Iterator[Callable[..., TrainLoader]]:
    """`build_train_loader` on the workspace; worker processes end with the test."""
    made: list[TrainLoader] = []

    def build(
        data: Data, micro_batch: int = 4, rank: int = 0, world_size: int = 1, **changes
    ) -> TrainLoader:
        params = loader_params(data, **changes)
        made.append(
            build_train_loader(
                params, workspace.root, micro_batch, rank=rank, world_size=world_size
            )
        )
        return made[-1]

    yield build
    for loader in made:
        loader.close()


@pytest.fixture
def eval_loader(workspace: Workspace) -> Iterator[Callable[..., EvalLoader]]:
    """`build_eval_loader` on the workspace's training split."""
    made: list[EvalLoader] = []

    def build(data: Data, **changes) -> EvalLoader:
        made.append(build_eval_loader(loader_params(data, **changes), workspace.root, "train"))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


@pytest.fixture
def per_image() -> Callable[[Iterable[Batch]], list[tuple[int, str]]]:
    """(image id, digest of everything that the batch says of it, padding aside), in order."""
    return _per_image


@pytest.fixture
def per_window() -> Callable[[Iterable[GlobalBatch]], list[list[tuple[int, str]]]]:
    """`per_image` of each window."""
    return lambda windows: [_per_image(window) for window in windows]


def _per_image(batches: Iterable[Batch]) -> list[tuple[int, str]]:
    found = []
    for batch in batches:
        boxes = batch.boxes_cxcywh.split(batch.counts)
        labels = batch.labels.split(batch.counts)
        for i, id_ in enumerate(batch.image_ids):
            height, width = batch.sizes[i].tolist()
            digest = hashlib.sha256(batch.images[i, :, :height, :width].numpy().tobytes())
            for tensor in (batch.sizes[i], boxes[i], labels[i], batch.original_sizes[i]):
                digest.update(tensor.numpy().tobytes())
            if batch.colour is not None:
                digest.update(batch.colour[i].numpy().tobytes())
            found.append((id_, digest.hexdigest()))
    return found


def loader_processes() -> set[BaseProcess]:
    """Those that run now: Python lists the processes that were started here."""
    return set(multiprocessing.active_children())
