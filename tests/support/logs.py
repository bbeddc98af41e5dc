"""Training logs as the tracker writes them, and small data sets with images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runkey.data.index import ClassName, ImageRecord
from runkey.tracking.log import JsonlLog

STEPS_PER_EPOCH = 20


def write_log(
    path: Path, epochs: int = 12, *, stopped: bool = False, validated: bool = True
) -> Path:
    """A training that warms up, is clipped, improves until epoch 8 and may be stopped."""
    rng = np.random.default_rng(0)
    path.unlink(missing_ok=True)  # a log is appended to
    log = JsonlLog(path, quiet=True)
    log.event("training_start", device="cpu", total_steps=epochs * STEPS_PER_EPOCH)
    for epoch in range(1, epochs + 1):
        for step in range((epoch - 1) * STEPS_PER_EPOCH + 1, epoch * STEPS_PER_EPOCH + 1):
            if step > 1 and step % 5:
                continue
            norm = 0.2 + 5 * math.exp(-step / 40) + abs(rng.normal(0, 0.2))
            log.log(
                {
                    "train/loss": 2 + 8 * math.exp(-step / 60),
                    "train/grad_norm": norm,
                    "train/grad_norm_clipped": min(norm, 0.5),
                    "train/clip_threshold": 0.5,
                    "train/images_per_second": 40.0,
                    "train/data_wait_share": 0.02,
                    "train/lr": 1e-3 * min(1, step / 30) * (0.1 if step > 160 else 1),
                    "train/epoch": step / STEPS_PER_EPOCH,
                },
                step,
            )
        values = {"train/epoch_loss": 2 + 8 / epoch, "train/epoch": float(epoch)}
        if validated:
            ap = 0.08 * min(epoch, 16 - epoch)
            values |= {"val/AP": ap, "val/AP50": ap * 1.4, "val/AP75": ap, "val/loss": 2.5}
            values["val/loss_gap"] = 2.5 - values["train/epoch_loss"]
        log.log(values, epoch * STEPS_PER_EPOCH)
    reason = "early stop: best val/AP 0.64" if stopped else f"all {epochs} epochs done"
    log.event("training_end", reason=reason, best_epoch=8, best_step=8 * STEPS_PER_EPOCH)
    log.close()
    return path


def cut(path: Path, part: float) -> Path:
    """What a crash leaves: the log up to the middle of a line."""
    content = path.read_bytes()
    content = content[: int(len(content) * part)]
    path.write_bytes(content[: content.rindex(b'"train/') + 9])
    return path


def resumed(path: Path) -> Path:
    """A log that a resumed training with a smaller `runtime.log_every` went on writing.

    What it logged between the steps that were there stands behind them, and so do hints.
    """
    whole = path.read_text().splitlines(keepends=True)
    later = [
        line for line in whole[4:30] if '"step": ' in line and '"train/epoch_loss"' not in line
    ]
    late = later[::3]
    first = [line for line in whole[:30] if line not in late]
    path.write_text("".join([*first, *late, *whole[30:]]))
    return path


EVENTS = (
    *(("skipped_step", step) for step in (33, 34, 35)),
    *(("loss_spike", step) for step in (60, 61)),
    *(("rollback", 37), ("resumed", 120), ("split", 7), ("evaluation_failed", 200)),
    *(("hint.loader", 40), ("hint.clip_always", 60)),
)


def troubled(path: Path) -> Path:
    """A training on whose way much happened."""
    log = JsonlLog(write_log(path), quiet=True)
    for kind, step in EVENTS:
        log.event(kind, step=step, seen="a", change="b")
    log.event("of another version", step="33")
    log.close()
    return path


LOGS: dict[str, Callable[[Path], Path]] = {
    "complete": lambda path: write_log(path),
    "stopped early": lambda path: write_log(path, stopped=True),
    "one epoch": lambda path: write_log(path, 1),
    "one step": lambda path: _first_lines(write_log(path, 1), 2),
    "no evaluation": lambda path: write_log(path, 3, validated=False),
    "interrupted": lambda path: cut(write_log(path), 0.4),
    "interrupted in the first line": lambda path: _text(path, '{"step": 1, "ti'),
    "resumed": lambda path: resumed(write_log(path)),
    "troubled": lambda path: troubled(path),
    "empty": lambda path: _text(path, ""),
    "not finite": lambda path: _text(path, _with_nan(write_log(path))),
}


def _text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def _first_lines(path: Path, count: int) -> Path:
    return _text(path, "".join(path.read_text().splitlines(keepends=True)[:count]))


def _with_nan(path: Path) -> str:
    """Every value of the second half as the tracker writes what JSON cannot hold."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[len(lines) // 2 :]:
        for name in line.get("values", {}):
            line["values"][name] = "nan" if "loss" in name else "inf"
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(params=LOGS)
def any_log(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Each kind of log in turn."""
    return LOGS[request.param](tmp_path / "logs" / "train.jsonl")


@pytest.fixture
def log_of(tmp_path: Path) -> Callable[[str], Path]:
    """A log of the named kind."""
    return lambda kind: LOGS[kind](tmp_path / "logs" / "train.jsonl")


@pytest.fixture
def image_set(tmp_path: Path) -> Callable[..., tuple[list[ImageRecord], list[ClassName], Path]]:
    """Makes images of given sizes with some boxes, and their index."""

    def make(
        sizes: list[tuple[int, int]], names: tuple[str, ...] = ("one", "two"), boxes: int = 3
    ) -> tuple[list[ImageRecord], list[ClassName], Path]:
        rng = np.random.default_rng(1)
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        records = []
        for number, (width, height) in enumerate(sizes, start=1):
            small = rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / f"{number}.png", compress_level=1)
            corners = rng.uniform(0, 0.7, (boxes, 2)) * [width, height]
            sides = rng.uniform(0.1, 0.3, (boxes, 2)) * [width, height]
            records.append(
                ImageRecord(
                    id=number,
                    file=f"{number}.png",
                    width=width,
                    height=height,
                    rotate=0,
                    mirror=False,
                    boxes_xywh=tuple(map(tuple, np.hstack([corners, sides]).tolist())),
                    labels=tuple(i % len(names) for i in range(boxes)),
                    areas=tuple(sides.prod(axis=1).tolist()),
                    crowd=tuple(i == 2 for i in range(boxes)),
                    annotation_ids=tuple(range(boxes)),
                )
            )
        classes = [ClassName(k, k + 10, name) for k, name in enumerate(names)]
        return records, classes, folder

    return make
