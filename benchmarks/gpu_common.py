"""What the checks of training on a GPU share: parameters, made-up windows, the machine's facts."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from runkey.data.dataset import Batch, GlobalBatch
from runkey.params import Params, parse_params

CLASSES = 8


class Report:
    """A JSON file that is written anew after every number; and until when there is time."""

    def __init__(self, path: Path, facts: dict[str, Any], deadline: float) -> None:
        """Begin a file with facts; `deadline` is a time of `time.monotonic`, as in any process."""
        self.path, self.content, self._deadline = path, facts, deadline
        self._started = time.monotonic()
        self.add("complete", False)

    @property
    def seconds_left(self) -> float:
        """Seconds until what has not begun should be left out."""
        return self._deadline - time.monotonic()

    def add(self, name: str, value: Any) -> None:
        """Write a value, or add rows to a list."""
        if isinstance(value, list):
            value = [*self.content.get(name, []), *value]
        self.content[name] = value
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        text = json.dumps(self.content, indent=1) + "\n"
        self.path.write_text(text, encoding="utf-8")

    def leave_out(self, what: str) -> None:
        """Note what there was no time for."""
        print(f"{what}: left out, no time", flush=True)
        self.add("left_out", [what])

    def end(self) -> None:
        """Say that the file is whole."""
        self.add("complete", True)


def about(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, date and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("RUNKEY_COMMIT", commit),
        "device": "cpu",
    }
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        facts |= {
            "device": torch.cuda.get_device_name(),
            "driver": driver,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def training_params(model: dict[str, Any], *, epochs: int, **training: Any) -> Params:
    """Parameters of a training that logs each step; `training` adds to that section."""
    return parse_params(
        {
            "lr": 1e-4,
            "seed": 0,
            "model": model,
            "optimizer": {"clip": {"threshold": 0.1}},
            "training": {
                "epochs": epochs,
                "early_stopping": {"metric": "val/loss", "mode": "min", "enabled": False},
                **training,
            },
            "runtime": {"progress": False, "log_every": 1},
        }
    )


class SyntheticLoader:
    """Windows of made-up images on the host, a function of (epoch, step) alone."""

    def __init__(
        self, steps: int, images: int, micro_batch: int, size: tuple[int, int], *, pin: bool
    ) -> None:
        self.steps_per_epoch = steps
        self._images, self._micro_batch, self._size, self._pin = images, micro_batch, size, pin

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
        """The windows of an epoch."""
        for step in range(start_step, self.steps_per_epoch):
            yield self.window(epoch * self.steps_per_epoch + step)

    def window(self, number: int) -> GlobalBatch:
        """One optimizer step's images."""
        cuts = range(0, self._images, self._micro_batch)
        window = tuple(
            make_batch(number * 1000 + i, min(self._micro_batch, self._images - i), self._size)
            for i in cuts
        )
        return tuple(batch.pin_memory() for batch in window) if self._pin else window

    def close(self) -> None:
        """Nothing to end."""


def make_batch(number: int, images: int, size: tuple[int, int], *, padded: bool = True) -> Batch:
    """A batch with 1 to 8 boxes an image; the last image is smaller if there is padding."""
    rng = torch.Generator().manual_seed(number)
    counts = tuple(int(n) for n in torch.randint(1, 9, (images,), generator=rng))
    sizes = torch.tensor([size] * images)
    pixels = torch.randint(0, 256, (images, *size, 3), dtype=torch.uint8, generator=rng)
    if padded:
        sizes[-1, 0] = max(1, size[0] * 3 // 4)
        pixels[-1, sizes[-1, 0] :] = 0
    boxes = sum(counts)
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        sizes=sizes,
        boxes_cxcywh=torch.rand(boxes, 4, generator=rng) * 0.4 + 0.3,
        labels=torch.randint(0, CLASSES, (boxes,), generator=rng),
        counts=counts,
        image_ids=tuple(range(number, number + images)),
        original_sizes=sizes,
    )
