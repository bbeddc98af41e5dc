"""A small detector with random weights, saved as training saves it; images and films for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runkey.errors import LockError
from runkey.inference.extras import import_extra
from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, save_model
from runkey.params import Model as ModelParams

CLASSES = (CardClass(0, 4, "ball"), CardClass(1, 9, "cube & more"))


@pytest.fixture(scope="session")
def small_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` of a detector of two classes, for images of 48 to 80 pixels."""
    model = ModelParams(hidden_dim=32, num_heads=2, feedforward_dim=48, num_queries=12)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "model"
    state = build_model(model, len(CLASSES)).state_dict()
    save_model(path, state, ModelCard(model, CLASSES, Sizes(48, 80)))
    return path


def photograph(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    """Coloured rectangles on a gradient, like no other seed's."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 2, columns * 2, rows + columns], axis=-1).clip(0, 255)
    for _ in range(5):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        pixels[top : top + 12, left : left + 16] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def has_av() -> bool:
    try:
        import_extra("av")
    except LockError:
        return False
    return True


def film(path: Path, frames: int = 10, *, rate: int = 5, corner: bool = False) -> None:
    """Write a video whose frame k is grey of value 20 k; with a white corner, top left."""
    av = import_extra("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 20 * number, np.uint8)
            if corner:
                pixels[:16, :16] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
