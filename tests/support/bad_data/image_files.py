"""Bad image files: damaged, too large, of another size or mode than is wanted."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tests.support.bad_data.faults import Case, image, policy


def truncated(folder: Any) -> None:
    path = folder.data / "train/b.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def png_bomb(folder: Any) -> None:
    """A valid PNG header of 30000x30000 pixels, in a file of a hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (folder.data / "train/b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    image(1, file_name="b.png", width=30000, height=30000)(folder)


def exif(folder: Any) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    folder.picture(5).save(folder.data / "train/b.jpg", exif=tags)


def save_as(mode: str, suffix: str = "jpg") -> Callable[[Any], None]:
    def change(folder: Any) -> None:
        name = f"b.{suffix}"
        folder.picture(5).convert(mode).save(folder.data / "train" / name)
        image(1, file_name=name)(folder)

    return change


def sixteen_bits(folder: Any) -> None:
    Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(folder.data / "train/b.png")
    image(1, file_name="b.png")(folder)


def floats(folder: Any) -> None:
    Image.fromarray(np.full((30, 40), 0.5, np.float32)).save(folder.data / "train/b.tif")
    image(1, file_name="b.tif")(folder)


def transparent_palette(folder: Any) -> None:
    palette = folder.picture(5).convert("P")
    palette.save(folder.data / "train/b.png", transparency=0)
    image(1, file_name="b.png")(folder)


CASES = [
    Case(
        "truncated JPEG",
        truncated,
        "data/train/b.jpg: image 2 is cut short or damaged; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "a text as an image",
        lambda folder: (folder.data / "train/b.jpg").write_text("<html>404</html>"),
        "data/train/b.jpg: image 2 is no image of a known format; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "empty file",
        lambda folder: (folder.data / "train/b.jpg").write_bytes(b""),
        "data/train/b.jpg: image 2 is empty; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "decompression bomb",
        png_bomb,
        "data/train/b.png: image 2 is 30000x30000, more than data.max_megapixels: 100; "
        "set data.checks.too_large_image: drop in params.yaml or mend the file",
    ),
    Case(
        "float pixels",
        floats,
        "data/train/b.tif: image 2 has 32-bit pixels (mode F, values 0.5 to 0.5) of no known "
        "range, which data.intensity_range can name; "
        "set data.checks.unreadable_image: drop in params.yaml or mend the file",
    ),
    Case(
        "other size than in the JSON",
        image(1, width=80),
        "data/train/b.jpg: image 2 is 40x30, but 80x30 in the JSON, of another shape, so that "
        "its boxes cannot be scaled; set data.checks.size_mismatch: drop in params.yaml or mend "
        "the file",
    ),
    Case(
        "width and height swapped",
        image(1, width=30, height=40),
        "data/train/b.jpg: image 2 is 40x30, but 30x40 in the JSON, with width and height swapped; "
        "set data.checks.size_mismatch: fix or drop in params.yaml or mend the file",
    ),
    Case(
        "EXIF rotation",
        exif,
        "data/train/b.jpg: image 2 is to be turned by EXIF (orientation 6); "
        "set data.checks.exif_rotation: fix or drop in params.yaml or mend the file",
        policy("exif_rotation"),
    ),
    *(
        Case(
            name,
            change,
            f"data/train/b.{suffix}: image 2 is of mode {mode}; "
            "set data.checks.unusual_mode: fix or drop in params.yaml or mend the file",
            policy("unusual_mode"),
        )
        for name, change, suffix, mode in (
            ("grey image", save_as("L"), "jpg", "L"),
            ("CMYK image", save_as("CMYK"), "jpg", "CMYK"),
            ("16-bit image", sixteen_bits, "png", "I;16, values 40000 to 40000"),
            ("palette image", transparent_palette, "png", "P"),
            ("transparent image", save_as("RGBA", "png"), "png", "RGBA"),
        )
    ),
]
