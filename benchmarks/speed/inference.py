"""Inference on one image: against the reference DETR and transformers, same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.inference import CHOICES, reference_network
from benchmarks.reference import Reference
from benchmarks.speed.pairs import OURS, Row, check, time_in_turn
from benchmarks.speed.peers import DETR, TRANSFORMERS, build_transformers
from benchmarks.speed.step import K, parameters
from runkey.errors import LockError
from runkey.inference.extras import import_extra
from runkey.inference.speed import AS_EVALUATED, NetworkOpener
from runkey.model.detr import build_model


def measure_inference(reference: Reference, rounds: int) -> Iterator[Row]:
    """Time R50 on one image of 800 x 1066 pixels, one thread: pixels to detections."""
    torch.set_num_threads(1)
    section = parameters().model
    theirs = reference.build(section)[0].eval()
    detector = build_model(section, K).eval()
    detector.load_state_dict(theirs.state_dict())
    transformers = build_transformers(section, theirs.state_dict(), K).eval()
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 800, 1066), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        opener = NetworkOpener(detector, Path(folder), threads=1, calibration=lambda: [])
        networks: dict[str, Callable[[NDArray[np.uint8]], Any]] = {
            DETR: reference_network(reference, theirs),
            TRANSFORMERS: _transformers_network(transformers),
        }
        for choice in CHOICES:
            if choice.precision == "int8" or not _is_installed(choice.runtime):
                continue
            name = OURS if choice == AS_EVALUATED else f"{OURS}, {choice.name}"
            networks[name] = opener.open(choice)
        name = "inference R50, 1 x 800x1066"
        scores = {one: np.asarray(network(image)[0])[0] for one, network in networks.items()}
        exact = {one: found for one, found in scores.items() if "bf16" not in one}
        differences = {
            one: float(np.abs(found[:100] - scores[OURS][:100]).max())
            for one, found in exact.items()
        }
        agreement = check(name, differences, 1e-4)
        contestants = {one: _call(network, image) for one, network in networks.items()}
        yield Row(name, time_in_turn(contestants, rounds), (DETR, TRANSFORMERS), agreement)


def _call(
    network: Callable[[NDArray[np.uint8]], Any], image: NDArray[np.uint8]
) -> Callable[[], None]:
    return lambda: network(image)


def _is_installed(runtime: str) -> bool:
    module = {"onnx": "onnxruntime", "openvino": "openvino"}.get(runtime, "torch")
    if find_spec(module):
        return True
    try:
        import_extra(module)
    except LockError:
        return False
    return True


def _transformers_network(model: nn.Module) -> Callable[[NDArray[np.uint8]], Any]:
    """Normalise, run, and score as its image processor does."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    @torch.no_grad()
    def run(images: NDArray[np.uint8]) -> Any:
        pixels = (torch.from_numpy(images).float() / 255 - mean) / std
        mask = torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.long)
        outputs = model(pixels, mask)
        scores, labels = outputs.logits.softmax(-1)[..., :-1].max(-1)
        best = scores.sort(dim=1, descending=True, stable=True)
        return best.values.numpy(), labels.gather(1, best.indices).numpy(), None

    return run
