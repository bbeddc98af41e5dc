"""16-bit and float images: the range that they use is told, and can be set."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runkey.data.decode import decode_rgb
from runkey.data.index import read_index
from runkey.errors import DataError
from runkey.inference.preprocess import Preprocess, read_image
from runkey.model.weights import Sizes
from tests.support import deep_colour
from tests.support.coco_folder import index


def fill(folder, low, high, suffix="png", dtype=np.uint16):
    """Replace all images with noise of low..high."""
    for split, names in (("train", "abc"), ("val", "de")):
        for position, name in enumerate(names):
            rng = np.random.default_rng(ord(name))
            noise = rng.uniform(low, high, (30, 40))
            values = (noise if dtype is np.float32 else np.rint(noise)).astype(dtype)
            values[0, :2] = (low, high)
            Image.fromarray(values).save(folder.data / split / f"{name}.{suffix}")
            getattr(folder, split)["images"][position]["file_name"] = f"{name}.{suffix}"


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [10, 12, 13])
def test_few_bits_in_a_16_bit_file_are_noted_and_can_be_scaled(folder, bits, suffix):
    most = 2**bits - 1
    fill(folder, 0, most, suffix)
    said = f"the 16-bit images (5) use the values 0 to {most} of 0..65535, so they have little"
    assert folder.run().notes == [f"{said} contrast; set data.intensity_range: [0, {most}]"]
    assert f"of mode I;16, values 0 to {most}" in folder.report()["items"][0]["what"]

    report = folder.run(intensity_range=(0, most), short_sides=(30,), long_side=40)
    assert report.notes == []
    record = index(folder)[1]
    decoded = decode_rgb(folder.data / record.file, 0, False, record.intensity_range)
    assert (decoded.min(), decoded.max()) == (0, 255)
    served = Preprocess(Sizes(30, 40, (0, most)))(read_image(folder.data / record.file, (0, most)))
    assert np.array_equal(served, decoded)
    found = read_index(folder.out / "train.safetensors")
    assert found.decoding(0) == (0, False, (0, most))


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("write", [deep_colour.png, deep_colour.tiff])
@pytest.mark.parametrize(("bits", "is_small"), [(10, True), (12, True), (16, False)])
def test_few_bits_in_16_bit_colour_are_noted(folder, bits, is_small, write, alpha):
    most = 2**bits - 1
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            values = np.random.default_rng(ord(name)).integers(0, most, (30, 40, 3))
            values[0, :2] = [[0], [most]]
            if alpha:
                values = np.concatenate([values, np.full((30, 40, 1), 65535)], axis=2)
            (folder.data / split / f"{name}.jpg").write_bytes(write(values))
    notes = [
        f"the 16-bit colour images (5) use the values 0 to {most} of 0..65535, of which the upper "
        "byte is read, so they have little contrast; scale the files to 0..65535 "
        "(data.intensity_range is for grey images)"
    ]
    # A range for grey images changes nothing in these.
    assert folder.run(intensity_range=(0, most)).notes == (notes if is_small else [])
    mode = f"of mode {'RGBA' if alpha else 'RGB'} with 16 bits, upper bytes 0 to {most >> 8}"
    assert mode in folder.report()["items"][0]["what"]


def test_dark_colours_among_bright_ones_are_no_note(folder):
    write = folder.data / "train/a.jpg"
    write.write_bytes(deep_colour.png(np.random.default_rng(0).integers(0, 4096, (30, 40, 3))))
    assert "16-bit colour images (1)" in folder.run().notes[0]
    bright = np.random.default_rng(1).integers(0, 65536, (30, 40, 3))
    (folder.data / "train/b.jpg").write_bytes(deep_colour.png(bright))
    assert folder.run().notes == []


@pytest.mark.parametrize("most", [16383 + 1000, 65535])
def test_a_range_that_is_used_is_no_note(folder, most):
    fill(folder, 0, most)
    assert folder.run().notes == []
    assert index(folder)[1].intensity_range is None


def test_a_hot_pixel_does_not_hide_a_small_range(folder):
    fill(folder, 0, 4095)
    path = folder.data / "train/a.png"
    values = np.array(Image.open(path))
    values[5, 5] = 65535
    Image.fromarray(values).save(path)
    (note,) = folder.run().notes
    assert "use the values 0 to 65535, nearly all of them" in note
    assert note.endswith("set data.intensity_range: [0, 4095]")


def test_a_narrow_band_far_from_black(folder):
    """A thermal camera's counts."""
    fill(folder, 30000, 31000)
    assert folder.run().notes[0].endswith("set data.intensity_range: [30000, 31000]")


def test_a_range_that_clips_is_noted(folder):
    fill(folder, 0, 4095)
    (note,) = folder.run(intensity_range=(0, 1023)).notes
    assert "are clipped to 0..1023; set data.intensity_range: [0, 4095]" in note


def test_float_images_need_a_range(folder):
    fill(folder, 0.0, 1.0, "tif", np.float32)
    folder.write()
    with pytest.raises(DataError, match=r"mode F, values 0 to 1\) of no known range, which data"):
        folder.prepare()
    folder.prepare(intensity_range=(0, 1), short_sides=(30,), long_side=40)
    record = index(folder)[1]
    pixels = decode_rgb(folder.data / record.file, 0, False, record.intensity_range)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_8_bit_files_that_are_nearly_black(folder):
    fill(folder, 0, 15, dtype=np.uint8)
    (note,) = folder.run().notes
    assert note.startswith("5 of 5 images use less than a quarter of the values 0 to 255")


def test_values_that_are_no_numbers_are_black(tmp_path):
    values = np.array([[np.nan, -np.inf, np.inf, 0.5]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert decode_rgb(tmp_path / "a.tif", 0, False, (0, 1))[0].tolist() == [[0, 0, 255, 128]]
