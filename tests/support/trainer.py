"""A training that is nothing but its record: `python -m tests.support.trainer FOLDER ADDRESS ...`.

It logs steps, writes checkpoints and may be killed like a real one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runkey.identity.record import LoggedRun
from runkey.progress import log_to_terminal
from runkey.tracking.describe import RunDescription
from runkey.tracking.log import JsonlLog
from runkey.tracking.mlflow_run import Pace, TrackedRun, open_run
from runkey.tracking.store import Store
from runkey.tracking.sync import TrainingRun

KEY = f"rk2-{'5' * 64}"
DESCRIPTION = RunDescription(
    name="lr=5e-05", params={"lr": "5e-05", "key": KEY}, tags={"device": "cpu", "key": KEY}
)
QUICK = Pace(flush_seconds=0.2, retry_seconds=0.3, close_seconds=60)


def training_in(folder: Path, device: str = "cpu") -> TrainingRun:
    """What is recorded in a folder."""
    description = replace(DESCRIPTION, tags={**DESCRIPTION.tags, "device": device})
    return TrainingRun("detection", description, folder, (folder / "train.jsonl",))


def begin(
    store: Store,
    folder: Path,
    *,
    device: str = "cpu",
    on_change: Callable[[LoggedRun], None] = lambda _: None,
    pace: Pace = QUICK,
    root: Path | None = None,
) -> TrackedRun:
    """Record a training in a folder, or go on; its workspace is the folder's if None is given."""
    training = training_in(folder, device)
    return open_run(store, training, root or folder / "workspace", on_change=on_change, pace=pace)


def log_steps(target: TrackedRun | JsonlLog, first: int, last: int) -> None:
    """Log the same values in every process."""
    log = target if isinstance(target, JsonlLog) else log_of(target)
    for step in range(first, last + 1):
        values = {f"train/v{n}": math.sin(step * n) for n in range(1, 6)}
        if step % 5 == 0:
            values["val/loss"] = math.nan if step % 20 == 0 else 1 / step
        log.log(values, step)
        if step % 7 == 0:
            log.event("skipped_step", step=step, image_ids=[step])


def log_of(run: TrackedRun) -> JsonlLog:
    """The log of a run that has one."""
    assert run.jsonl
    return run.jsonl


def train(arguments: argparse.Namespace) -> None:
    """Go on from the checkpoint, if there is one, to the last step."""
    folder = Path(arguments.folder)
    checkpoint = folder / "checkpoint.json"
    tracker = begin(Store(arguments.address, arguments.artifacts, folder), folder)
    log = log_of(tracker)
    step = 0
    if checkpoint.is_file():
        content = json.loads(checkpoint.read_text())
        step = content["step"]
        log.resume(content["position"])
        log.event("resumed", step=step)
    else:
        log.resume(None)
    while step < arguments.steps:
        step += 1
        log_steps(log, step, step)
        if step % arguments.every == 0:
            content = {"step": step, "position": log.position()}
            temporary = checkpoint.with_suffix(".new")
            temporary.write_text(json.dumps(content))
            temporary.replace(checkpoint)
        time.sleep(arguments.pause)
    tracker.finish_logs()
    tracker.close()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("address")
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--pause", type=float, default=0.01)
    log_to_terminal()
    train(parser.parse_args())


if __name__ == "__main__":
    main()
