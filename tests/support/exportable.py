"""A small saved model of each preset, and images, for what runs and exports models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, save_model
from runkey.params import Model

CLASSES = (CardClass(0, 4, "ball"), CardClass(1, 9, "cube"))
SIZES = Sizes(48, 80)


def save_small_model(folder: Path, preset: str = "fast", **changes) -> Path:
    """A folder model/ with random weights; its scores differ from query to query."""
    values = {"hidden_dim": 32, "num_heads": 2, "feedforward_dim": 48, "num_queries": 12}
    model = Model(**values | {"preset": preset} | changes)
    torch.manual_seed(0)
    detector = build_model(model, len(CLASSES)).eval()
    for module in detector.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    save_model(folder, detector.state_dict(), ModelCard(model, CLASSES, SIZES))
    return folder


def save_images(folder: Path, count: int = 4) -> list[Path]:
    """Images of several shapes, the second with EXIF orientation 6."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    shapes = ((60, 80), (40, 90), (120, 160), (80, 60))
    found = []
    for number in range(count):
        # Smooth: what is resized otherwise differs by little.
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        size = shapes[number % len(shapes)][::-1]
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if number == 1:
            exif[0x0112] = 6
        found.append(folder / f"{number}.png")
        image.save(found[-1], exif=exif)
    return found


def write_best_scores(model: Path, **scores: float) -> None:
    """thresholds.json in the folder of a model."""
    from runkey.hashing import sha256_file

    classes = {n: {"score": s, "precision": 1, "recall": 1, "f1": 1} for n, s in scores.items()}
    weights = sha256_file(model / "weights.safetensors")
    content = {"iou": 0.5, "weights": weights, "classes": classes}
    (model / "thresholds.json").write_text(json.dumps(content))
