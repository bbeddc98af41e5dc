"""The decoded cache: what goes in comes out, whoever asks, and without it pixels are the same."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch

from runkey.data import cache as module
from runkey.data.cache import CachePlan, cache_file, open_cache, plan_cache, shrunk_sizes
from runkey.data.cache import write_cache as write
from runkey.data.decode import decode_rgb
from runkey.data.index import Index, read_index
from runkey.data.loader import build_train_loader, is_cached
from runkey.errors import DataError
from runkey.params import Data
from tests.support.workspace import loader_params


def images():
    rng = np.random.default_rng(0)
    sizes = ((3, 5), (7, 2), (1, 1), (40, 30))
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def plan_of(pictures):
    return CachePlan(np.array([one.shape[:2] for one in pictures], dtype=np.int64), shrinks=False)


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "a.npy", plan_of(images()), images())
    return tmp_path / "a.npy"


def test_round_trip(path):
    cache = open_cache(path, plan_of(images()))
    assert len(cache) == 4
    message = pickle.dumps(cache)
    assert len(message) < 2000
    for index, pixels in enumerate(images()):
        for opened in (cache, pickle.loads(message)):  # noqa: S301
            image = opened.image(index)
            assert image.dtype == torch.uint8
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
            image.zero_()  # changes nothing of the cache
            assert opened.image(index).any()


def test_it_is_a_plain_npy_file(path):
    flat = np.load(path)
    assert flat.shape == (sum(pixels.size for pixels in images()),)
    assert np.array_equal(flat[:45].reshape(3, 5, 3), images()[0])


def test_a_missing_or_damaged_file_is_none(path):
    content = path.read_bytes()
    for broken in (content[:-1], content + b"x" * 3, content[:50], b""):
        path.write_bytes(broken)
        assert open_cache(path, plan_of(images())) is None
    path.write_bytes(content)
    assert open_cache(path, plan_of(images()[:3])) is None
    assert open_cache(path.with_name("b.npy"), plan_of(images())) is None


def test_changed_bytes_are_found_before_a_training(path):
    assert open_cache(path, plan_of(images()), checked=True)
    content = bytearray(path.read_bytes())
    for place in (128, len(content) - 33, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        assert open_cache(path, plan_of(images()))
        assert open_cache(path, plan_of(images()), checked=True) is None
        content[place] ^= 1


def test_a_worker_does_without_a_file_that_was_deleted(path):
    cache = open_cache(path, plan_of(images()))
    message = pickle.dumps(cache)
    path.unlink()
    assert pickle.loads(message) is None  # noqa: S301
    assert np.array_equal(cache.image(0).permute(1, 2, 0).numpy(), images()[0])


def test_the_least_recently_used_are_deleted(path):
    for number in range(12):
        other = path.with_name(f"{number}.npy")
        write(other, plan_of(images()), images())
        os.utime(other, (number, number))
        open_cache(path, plan_of(images()))
    kept = sorted(one.name for one in path.parent.iterdir())
    assert len(kept) == module._KEPT_FILES
    assert {"a.npy", "11.npy", "10.npy"} < set(kept)


def test_where_it_cannot_be_written_a_line_says_so(path, logged):
    write(path / "b.npy", plan_of(images()), images())
    assert logged()[-1].startswith(f"images are decoded in every epoch: {path}/b.npy: cannot be")


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((640, 480), (216, 162)),  # 120 x 1.35
        ((480, 640), (162, 216)),
        ((200, 150), (200, 150)),  # never enlarged
        ((1600, 100), (216, 14)),  # the long side's bound of 160 wins
        ((10_000, 1), (216, 1)),
    ],
)
def test_size_of_the_cached_images_of_train(size, wanted):
    data = Data(short_sides=(60, 120), long_side=160)
    assert shrunk_sizes(np.array([size]), data).tolist() == [list(wanted)]


@pytest.fixture
def records(workspace, make_record):
    rng = random.Random(0)
    made = [
        make_record(i, (rng.randint(30, 90), rng.randint(30, 90)), rotate=90 * (i % 2), boxes=i % 3)
        for i in range(20)
    ]
    workspace.write(made)
    return made


DATA = Data(short_sides=(20, 30), long_side=40)


@pytest.mark.parametrize("mib", [0.04, 0.06, 1])
def test_without_the_file_pixels_are_the_same(
    workspace, records, train_loader, eval_loader, per_window, per_image, mib
):
    """Of all images, or of some; whether it was deleted, cannot be made, or is made."""
    data = DATA.model_copy(update={"cache_gib": mib / 1024})
    plan = plan_cache(data, Index.of(records), training=True)
    assert (len(plan.shapes) == 20) == plan.shrinks == (mib == 1)
    assert len(plan.shapes) >= 3
    folder = workspace.root / ".runkey"
    params = loader_params(data, cached=True)
    assert not is_cached(params, workspace.root, "train")
    want = per_window(train_loader(data, cached=True).epoch(0))
    assert is_cached(params, workspace.root, "train") == (mib == 1)
    seen = per_image(eval_loader(data, cached=True))
    assert seen == per_image(eval_loader(data))
    files = list(folder.glob("decoded/*.npy"))
    assert len(files) >= 1
    assert per_window(train_loader(data, cached=True).epoch(0)) == want
    for file in files:
        file.unlink()
    (folder / "decoded").rmdir()
    (folder / "decoded").write_text("no folder")
    assert per_window(train_loader(data, cached=True, rank=0).epoch(0)) == want
    assert per_image(eval_loader(data, cached=True)) == seen
    uncached = per_window(train_loader(data).epoch(0))
    assert (uncached == want) == (mib != 1)


def test_images_of_train_are_shrunk_as_they_are_stored(workspace, records, train_loader):
    data = Data(short_sides=(20,), long_side=40)
    train_loader(data, cached=True)
    plan = plan_cache(data, Index.of(records), training=True)
    index = read_index(workspace.prepared / "train.safetensors")
    cache = open_cache(cache_file(workspace.prepared, index, plan), plan)
    shrunk = 0
    for i, record in enumerate(records):
        path = workspace.root / "data" / record.file
        whole = decode_rgb(path, record.rotate, record.mirror)
        assert cache.image(i).shape[1:] == tuple(plan.shapes[i].tolist())
        if cache.image(i).shape == whole.shape:
            assert torch.equal(cache.image(i), whole)
        else:
            shrunk += 1
            means = (image.float().mean((1, 2)) for image in (cache.image(i), whole))
            assert torch.allclose(*means, atol=4)
    assert shrunk > 10


def test_an_image_that_changed_since_prepare_is_not_cached(folder):
    folder.run()
    (folder.root / "prepared").mkdir(exist_ok=True)
    params = loader_params(Data(), cached=True)
    folder.picture(99).save(folder.data / "train/a.jpg")
    with pytest.raises(DataError, match=r"train/a\.jpg: not what prepare read"):
        build_train_loader(params, folder.root, 2)
    assert not list(folder.root.glob(".runkey/decoded/*"))


def test_another_image_is_in_another_file(folder):
    """Its pixels are named by the images' content, so an old file is never taken."""

    def file():
        folder.run()
        index = read_index(folder.out / "train.safetensors")
        return cache_file(folder.out, index, plan_cache(Data(), index, training=True))

    before = file()
    assert before == file()
    folder.picture(99).save(folder.data / "train/a.jpg")
    assert file() != before
    index = read_index(folder.out / "train.safetensors")
    other = plan_cache(Data(short_sides=(10,)), index, training=True)
    assert cache_file(folder.out, index, other) != file()
