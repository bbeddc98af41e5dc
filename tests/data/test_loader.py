"""The loader as a whole: purity, resuming, evaluation, worker processes and their errors."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from runkey.data.loader import resolve_workers
from runkey.errors import DataError
from runkey.params import Augment, Data
from tests.support.workspace import loader_processes

DATA = Data(
    short_sides=(30, 40),
    long_side=60,
    augment=Augment(
        crop_probability=0.3, crop_short_sides=(50, 60), crop_min=20, crop_max=40, saturation=0.1,
        zoom_out_probability=0.3, mosaic_probability=0.4,
    ),
)  # fmt: skip


@pytest.fixture
def records(workspace, make_record):
    rng = random.Random(0)
    made = [
        make_record(3 * i, (rng.randint(30, 90), rng.randint(30, 90)), boxes=i % 5)
        for i in range(22)
    ]
    workspace.write(made)
    return made


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 3}, {"micro_batch": 99}])
def test_windows_are_the_same_whatever_the_micro_batch(records, train_loader, per_window, changes):
    want = per_window(train_loader(DATA, batch_size=5).epoch(2))
    assert per_window(train_loader(DATA, batch_size=5, **changes).epoch(2)) == want
    for window in train_loader(DATA, batch_size=5, **changes).epoch(2):
        assert all(len(batch) <= changes["micro_batch"] for batch in window)


def test_bytes_are_the_same_for_any_number_of_workers(records, train_loader, per_window):
    """Workers are kept between epochs, and an epoch that was left half way disturbs nothing."""
    want = [per_window(train_loader(DATA).epoch(epoch)) for epoch in range(3)]
    assert want[0] != want[1]
    for workers in (1, 2):
        before = loader_processes()
        loader = train_loader(DATA, workers=workers, prefetch=2)
        assert per_window(loader.epoch(0)) == want[0]
        started = loader_processes() - before
        assert len(started) == workers
        left = loader.epoch(1)
        next(left)
        assert per_window(loader.epoch(2)) == want[2]
        assert per_window(loader.epoch(1, start_step=2)) == want[1][2:]
        assert loader_processes() - before == started


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6])
def test_resuming_in_mid_epoch_continues_the_epoch(records, train_loader, per_window, start):
    whole = per_window(train_loader(DATA).epoch(4))
    assert len(whole) == train_loader(DATA).steps_per_epoch == 6
    assert per_window(train_loader(DATA).epoch(4, start_step=start)) == whole[start:]


def test_every_image_once_an_epoch_and_other_draws_each_time(records, train_loader, per_image):
    loader = train_loader(DATA)
    epochs = [dict(per_image(b for w in loader.epoch(e) for b in w)) for e in range(3)]
    assert all(sorted(epoch) == [r.id for r in records] for epoch in epochs)
    for id_ in epochs[0]:
        assert len({epoch[id_] for epoch in epochs}) == 3
    other = train_loader(DATA, seed=2)
    assert dict(per_image(b for w in other.epoch(0) for b in w)) != epochs[0]


def test_the_global_random_state_is_neither_read_nor_moved(records, train_loader, per_window):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    want = per_window(train_loader(DATA).epoch(0))
    loader = train_loader(DATA, workers=1)
    assert per_window(loader.epoch(0)) == want
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert per_window(loader.epoch(0)) == want


def test_ranks_share_each_window(records, train_loader, per_window):
    whole = per_window(train_loader(DATA, batch_size=8).epoch(0))
    parts = [
        per_window(train_loader(DATA, batch_size=8, rank=rank, world_size=3).epoch(0))
        for rank in range(3)
    ]
    assert [sorted(a + b + c) for a, b, c in zip(*parts, strict=True)] == list(map(sorted, whole))
    assert max(abs(len(a) - len(c)) for a, _, c in zip(*parts, strict=True)) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_unchanged(records, eval_loader, per_image, workers):
    batches = list(eval_loader(DATA, workers=workers))
    assert sorted(id_ for batch in batches for id_ in batch.image_ids) == [r.id for r in records]
    assert all(batch.colour is None for batch in batches)
    counts = {id_: n for b in batches for id_, n in zip(b.image_ids, b.counts, strict=True)}
    assert counts == {r.id: len(r.labels) for r in records}
    boxes = {
        id_: some.tolist()
        for b in batches
        for id_, some in zip(b.image_ids, b.boxes_cxcywh.split(b.counts), strict=True)
    }
    for r in records:
        want = [
            [(x + w / 2) / r.width, (y + h / 2) / r.height, w / r.width, h / r.height]
            for x, y, w, h in r.boxes_xywh
        ]
        assert torch.tensor(boxes[r.id]).sub(torch.tensor(want)).abs().sum() < 1e-5
    aspects = [(w / h, h > w) for batch in batches for h, w in batch.sizes.tolist()]
    assert aspects == sorted(aspects, key=lambda a: (a[1], a[0]))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_gives_the_same_images_whatever_the_batch(
    records, eval_loader, per_image, batch_size
):
    loader = eval_loader(DATA, batch_size=batch_size)
    assert per_image(loader) == per_image(eval_loader(DATA))
    assert max(map(len, loader)) <= batch_size


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_in_one_line(workspace, records, train_loader, workers):
    path = workspace.root / "data" / records[7].file
    path.write_bytes(path.read_bytes()[:200])
    loader = train_loader(DATA, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader.epoch(0))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_a_killed_worker_is_told_of_in_one_line(records, train_loader):
    loader = train_loader(DATA, workers=1, prefetch=1, micro_batch=1)
    before = loader_processes()
    windows = loader.epoch(0)
    next(windows)
    (worker,) = loader_processes() - before
    worker.kill()
    with pytest.raises(DataError, match=r"^a loader process was killed.*runtime\.workers"):
        list(windows)


READS = """
import numpy
from runkey.data.loader import BatchStream
from runkey.errors import DataError
try:
    list(BatchStream(numpy.zeros((4, 50000)), 1, 1, False).batches([0, 1, 2, 3]))
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small /dev/shm")
@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("4k", "loader processes cannot be started (No space left on device); give /dev/shm more"),
        ("60k", "a loader process was killed, usually because memory or /dev/shm ran out; lower"),
    ],
)
def test_a_full_dev_shm_is_told_of_in_one_line(size, says):
    """With no room for locks, and with room for these and not for batches."""
    mounted = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c '{READS}'"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.stdout.startswith(says), done.stderr
    assert done.stderr == ""


def test_a_worker_that_was_killed_between_two_epochs_too(records, train_loader):
    loader = train_loader(DATA, workers=1, prefetch=1, micro_batch=1)
    before = loader_processes()
    list(loader.epoch(0))
    (worker,) = loader_processes() - before
    worker.kill()
    worker.join()
    with pytest.raises(DataError, match=r"^a loader process was killed.*runtime\.workers"):
        next(loader.epoch(1))


def test_no_index_and_an_empty_index(workspace, train_loader, eval_loader):
    with pytest.raises(DataError, match="dvc repro prepare"):
        train_loader(DATA)
    workspace.write([])
    with pytest.raises(DataError, match=r"train\.safetensors: holds no image"):
        eval_loader(DATA)


def test_workers_are_chosen_with_a_reason():
    assert resolve_workers(3, True) == (3, "runtime.workers")
    assert resolve_workers("auto", True)[0] == 0
    count, reason = resolve_workers("auto", False)
    assert count == min(8, len(os.sched_getaffinity(0)))
    assert "cores" in reason
