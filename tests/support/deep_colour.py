"""Files of 16-bit colour, which PIL reads and cannot write."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_PNG_KINDS = {2: 4, 3: 2, 4: 6}
"""PNG's colour type by the number of channels: grey with alpha, RGB, RGBA."""


def png(values: NDArray[np.integer]) -> bytes:
    """Return a PNG of values [H, W, C], 0..65535."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_KINDS[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def tiff(values: NDArray[np.integer]) -> bytes:
    """Return an uncompressed TIFF of values [H, W, C], 0..65535; C is 3, or 4 with opacity."""
    height, width, channels = values.shape
    pixels = values.astype("<u2").tobytes()
    short, long = 3, 4
    tags = [
        (256, short, 1, width),
        (257, short, 1, height),
        (258, short, channels, 0),
        (259, short, 1, 1),
        (262, short, 1, 2),
        (273, long, 1, 8),
        (277, short, 1, channels),
        (278, short, 1, height),
        (279, long, 1, len(pixels)),
        *([(338, short, 1, 2)] if channels == 4 else []),
    ]
    start = 8 + len(pixels)
    bits = start + 2 + 12 * len(tags) + 4
    directory = struct.pack("<H", len(tags))
    for tag, kind, count, value in tags:
        directory += struct.pack("<HHII", tag, kind, count, bits if tag == 258 else value)
    depths = struct.pack(f"<{channels}H", *[16] * channels)
    return b"II*\0" + struct.pack("<I", start) + pixels + directory + bytes(4) + depths
