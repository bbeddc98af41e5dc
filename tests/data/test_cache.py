"""The decoded cache: what goes in comes out, whoever asks."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from runkey.data.cache import HEADROOM, Scratch, cached_size, open_cache, write_cache
from runkey.data.decode import decode_rgb
from runkey.data.index import read_index
from runkey.errors import DataError


def images():
    rng = np.random.default_rng(0)
    sizes = ((3, 5), (7, 2), (1, 1), (40, 30))
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def test_round_trip(tmp_path):
    write_cache(tmp_path, "train", images())

    cache = open_cache(tmp_path, "train")

    assert len(cache) == 4
    for index, pixels in enumerate(images()):
        image = cache.image(index)
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_it_is_a_plain_npy_file(tmp_path):
    write_cache(tmp_path, "val", images())

    flat = np.load(tmp_path / "cache_val.npy")

    assert flat.shape == (sum(pixels.size for pixels in images()),)
    assert np.array_equal(flat[:45].reshape(3, 5, 3), images()[0])


def test_no_cache(tmp_path):
    assert open_cache(tmp_path, "train") is None


def test_pickled_for_a_worker_it_holds_no_pixels(tmp_path):
    write_cache(tmp_path, "train", [np.zeros((300, 300, 3), np.uint8), *images()])

    message = pickle.dumps(open_cache(tmp_path, "train"))

    assert len(message) < 2000
    assert np.array_equal(pickle.loads(message).image(1).permute(1, 2, 0).numpy(), images()[0])  # noqa: S301


def test_writing_to_an_image_leaves_the_cache_alone(tmp_path):
    write_cache(tmp_path, "train", images())
    cache = open_cache(tmp_path, "train")

    cache.image(3).zero_()

    assert cache.image(3).any()


def test_a_cache_cut_short_is_refused(tmp_path):
    write_cache(tmp_path, "train", images())
    path = tmp_path / "cache_train.npy"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(DataError, match=r"cache_train\.npy: 3817 bytes, not 3818; run `dvc repro"):
        open_cache(tmp_path, "train")


def test_scratch_gives_back_any_choice_in_any_order(tmp_path):
    scratch = Scratch(tmp_path / "scratch.tmp")
    places = [scratch.append(pixels) for pixels in images()]

    chosen = list(scratch.read([places[3], places[0]]))

    assert places == [(0, 3, 5), (45, 7, 2), (87, 1, 1), (90, 40, 30)]
    assert np.array_equal(chosen[0], images()[3])
    assert np.array_equal(chosen[1], images()[0])
    scratch.close()
    assert not (tmp_path / "scratch.tmp").exists()


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
def test_cached_size(size, wanted):
    assert pytest.approx(1.35) == HEADROOM
    assert cached_size(*size, short_sides=(60, 120), long_side=160) == wanted


def test_prepare_caches_small_images_as_they_are(folder):
    folder.run(short_sides=(30,), long_side=40)
    records = read_index(folder.out / "train.safetensors")
    cache = open_cache(folder.out, "train")

    assert len(cache) == len(records) == 3
    for index, record in enumerate(records):
        decoded = decode_rgb(folder.data / record.file, record.rotate, record.mirror)
        assert torch.equal(cache.image(index), decoded)


def test_prepare_shrinks_large_images_of_train(folder):
    folder.run(short_sides=(10,), long_side=20)

    cache = open_cache(folder.out, "train")

    assert cache.image(0).shape == (3, 14, 18)
    whole = decode_rgb(folder.data / "train/a.jpg", 0, False).float()
    assert torch.allclose(cache.image(0).float().mean((1, 2)), whole.mean((1, 2)), atol=4)


@pytest.mark.parametrize("short_side", [10, 45])
def test_the_val_cache_holds_the_pixels_of_evaluation(folder, short_side):
    folder.run(short_sides=(short_side,), long_side=60)

    cache = open_cache(folder.out, "val")

    for index, record in enumerate(read_index(folder.out / "val.safetensors")):
        with Image.open(folder.data / record.file) as image:
            size = (short_side * 4 // 3, short_side)
            wanted = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        assert np.array_equal(cache.image(index).permute(1, 2, 0).numpy(), wanted)


def test_one_json_gives_both_caches(folder):
    annotations = folder.data / "annotations"
    (annotations / "instances_train.json").write_text(json.dumps(folder.train))
    (annotations / "instances_train.json").rename(folder.data / "all.json")
    folder.prepare(short_sides=(10,), long_side=20, val_fraction=0.4)

    assert open_cache(folder.out, "val").image(0).shape == (3, 10, 13)
    assert open_cache(folder.out, "train").image(0).shape == (3, 14, 18)


def test_no_cache_where_it_would_be_too_large(folder, logged):
    folder.run(cache_gib=0.0)
    assert open_cache(folder.out, "train") is None
    assert any("not cached" in line for line in logged())

    just_val = (2 * 40 * 30 * 3 + 1) / 2**30
    folder.run(cache_gib=just_val, short_sides=(30,), long_side=40)
    assert open_cache(folder.out, "train") is None
    assert len(open_cache(folder.out, "val")) == 2
    assert not list(folder.out.glob("*.tmp"))
