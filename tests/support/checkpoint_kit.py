"""A small thing to save, and a disk that is full or read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from runkey.training.checkpoint import Checkpoint, FolderCheckpoints, Interval
from runkey.training.state import Best, LoopState

FINGERPRINT = {
    "key": "rk2-" + "a" * 64,
    "micro_batch": 4,
    "world_size": 1,
    "device": "cpu",
    "precision": "off",
}


class Training:
    """Two layers and an optimizer, which change with every step."""

    def __init__(self, width: int = 8) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.state = LoopState()

    def step(self) -> None:
        torch.manual_seed(self.state.step)
        self.model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1

    def evaluate(self) -> None:
        self.state.best = Best({"val/AP": 0.5}, 1, self.state.step)
        self.state.best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            step=self.state.step,
            state=self.state.as_plain(),
            parts={"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()},
            position={"log_bytes": 100 * self.state.step},
            best_weights=self.state.best_weights,
        )


@pytest.fixture
def open_checkpoints(tmp_path: Path) -> Callable[..., FolderCheckpoints]:
    """Checkpoints in `tmp_path`, or another folder, as a new process would open them."""

    def open_checkpoints(folder: Path = tmp_path, seconds=0, retry_seconds=0.0, **changes):
        return FolderCheckpoints(
            folder,
            FINGERPRINT | changes,
            interval=Interval(seconds),
            retry_seconds=retry_seconds,
        )

    return open_checkpoints


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mount is refused here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with _mounted(tmp_path / "disk", "size=1m") as folder:
        yield folder


def equal(left, right) -> bool:
    """Bit for bit and stride for stride, through all that is nested."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.stride() == right.stride()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right
