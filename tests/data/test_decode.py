"""Every mode and every EXIF orientation comes out as the RGB that a viewer shows."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from runkey.data import decode
from runkey.data.decode import FORMATS, TURNED, decode_rgb, is_unusual, open_image
from runkey.errors import DataError
from tests.support import deep_colour


def pixels(path, rotate=0, mirror=False):
    image = decode_rgb(path, rotate, mirror)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation_as_a_viewer_turns_it(folder, orientation, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = orientation
    path = tmp_path / "turned.png"
    folder.picture(1).save(path, exif=tags)

    turned = pixels(path, *TURNED.get(orientation, (0, False)))

    with Image.open(path) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(turned, shown)
    assert turned.shape == ((30, 40, 3) if orientation < 5 else (40, 30, 3))


def test_without_turning_exif_is_ignored(folder, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    folder.picture(1).save(tmp_path / "a.png", exif=tags)

    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(folder.picture(1)))


def test_grey_is_repeated(folder, tmp_path):
    grey = folder.picture(1).convert("L")
    grey.save(tmp_path / "a.png")

    assert np.array_equal(pixels(tmp_path / "a.png"), np.dstack([np.asarray(grey)] * 3))


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")

    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bit_big_endian_tiff(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=">u2")
    Image.frombytes("I;16B", (3, 1), values.tobytes()).save(tmp_path / "a.tif")

    assert pixels(tmp_path / "a.tif")[0, :, 1].tolist() == [0, 1, 255]


def test_transparent_pixels_lie_on_white(tmp_path):
    values = np.zeros((1, 3, 4), dtype=np.uint8)
    values[0, :, 0] = 200
    values[0, :, 3] = (0, 255, 51)
    Image.fromarray(values).save(tmp_path / "a.png")

    shown = pixels(tmp_path / "a.png")[0]
    assert shown[0].tolist() == [255, 255, 255]
    assert shown[1].tolist() == [200, 0, 0]
    assert np.allclose(shown[2], [244, 204, 204], atol=1)


def test_transparent_grey(tmp_path):
    values = np.array([[[100, 0], [100, 255]]], dtype=np.uint8)
    Image.fromarray(values, "LA").save(tmp_path / "a.png")

    assert pixels(tmp_path / "a.png")[0].tolist() == [[255] * 3, [100] * 3]


def test_transparent_palette_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=0)
    image.save(tmp_path / "partly.png", transparency=bytes([255, 0]))

    assert pixels(tmp_path / "a.png")[0].tolist() == [[255] * 3, [40, 50, 60]]
    assert pixels(tmp_path / "partly.png")[0].tolist() == [[10, 20, 30], [255] * 3]


def test_one_rgb_colour_declared_transparent(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(9, 9, 9))

    assert pixels(tmp_path / "a.png")[0].tolist() == [[1, 2, 3], [255] * 3]


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[:at] + jpeg[at + 2 + length :]


def test_cmyk_with_and_without_adobes_inversion(tmp_path):
    # Cyan ink only: what is printed is cyan, red is gone.
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "adobe.jpg", quality=100)
    content = (tmp_path / "adobe.jpg").read_bytes()
    # Without the marker, stored inks are what they are: invert them before they are stored.
    plain = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 255)).save(plain, "JPEG", quality=100)
    (tmp_path / "plain.jpg").write_bytes(without_adobe_marker(plain.getvalue()))
    assert b"Adobe" in content

    for name in ("adobe.jpg", "plain.jpg"):
        red, green, blue = pixels(tmp_path / name)[4, 4]
        assert red < 5, name
        assert green > 250, name
        assert blue > 250, name


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_promised_opens(folder, kind):
    content = io.BytesIO()
    folder.picture(1).save(content, kind)

    with open_image(content.getvalue()) as image:
        assert image.format == kind
        assert is_unusual(image) is (kind == "GIF")


def test_sixteen_bit_colour_is_unusual_though_pil_says_rgb(tmp_path):
    for name, write in (("a.png", deep_colour.png), ("a.tif", deep_colour.tiff)):
        path = tmp_path / name
        path.write_bytes(write(np.array([[[65535, 32768, 0]]])))
        with open_image(path.read_bytes()) as image:
            assert is_unusual(image)
        assert pixels(path)[0, 0].tolist() == [255, 128, 0]


def test_pixels_may_be_written_to(folder, tmp_path):
    folder.picture(1).save(tmp_path / "a.png")

    image = decode_rgb(tmp_path / "a.png", 90, True)
    image.zero_()

    assert decode_rgb(tmp_path / "a.png", 90, True).any()


def test_a_file_that_went_missing_or_broke_after_prepare(folder, tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(DataError) as caught:
        decode_rgb(path, 0, False)
    assert str(caught.value) == (
        f"{path}: not found, though prepare accepted it; run `dvc repro prepare` again"
    )
    folder.picture(1).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.jpg: unreadable \(.*truncated.*run `dvc repro"):
        decode_rgb(path, 0, False)


JPEGS = {
    "plain": {},
    "coarse": {"quality": 10},
    "fine": {"quality": 100, "subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "RGB": {"keep_rgb": True, "subsampling": 0},
}


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("size", [(1, 1), (17, 31), (160, 120)])
def test_torchvision_decodes_jpegs_to_the_pixels_of_pil(folder, options, size, grey):
    picture = folder.picture(1, *size).filter(ImageFilter.GaussianBlur(1))
    if grey and "keep_rgb" not in options:
        picture = picture.convert("L")
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)

    decoded = decode._decode_plain_jpeg(file.getvalue())

    assert np.array_equal(decoded, np.asarray(Image.open(file).convert("RGB")))


def test_other_files_are_left_to_pil(folder, tmp_path):
    """CMYK, another format, and a JPEG that is cut short, of which PIL says what is wrong."""
    file = io.BytesIO()
    folder.picture(1).convert("CMYK").save(file, "JPEG")
    assert decode._decode_plain_jpeg(file.getvalue()) is None
    for kind in ("PNG", "JPEG2000"):
        folder.picture(1).save(file := io.BytesIO(), kind)
        assert decode._decode_plain_jpeg(file.getvalue()) is None
    folder.picture(1, 160, 120).save(file := io.BytesIO(), "JPEG")
    for kept in (2, 3, 20, 160, 2000):
        assert decode._decode_plain_jpeg(file.getvalue()[:kept]) is None
    (tmp_path / "a.jpg").write_bytes(file.getvalue()[:2000])
    with pytest.raises(DataError, match="truncated"):
        decode_rgb(tmp_path / "a.jpg", 0, False)


def test_torchvision_itself_is_not_imported(folder, tmp_path):
    """It takes seconds, in every loader process."""
    folder.picture(1).save(tmp_path / "a.jpg")
    code = (
        "import sys; from pathlib import Path; from runkey.data import decode;"
        "assert 'torch' not in sys.modules;"
        "decode.decode_rgb(Path(sys.argv[1]), 0, False); assert decode._jpeg_decoder();"
        "assert 'torchvision' not in sys.modules;"
        "import torchvision.io; torchvision.io.read_image(sys.argv[1])"  # beside it, as models do
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.jpg"], check=True)
