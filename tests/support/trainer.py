"""A training that is nothing but its record: `python -m tests.support.trainer FOLDER ADDRESS ...`.

It logs steps, writes checkpoints and may be killed like a real one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runkey.identity.record import LoggedRun
from runkey.tracking import JsonlLog, RunDescription, RunTracker, Store, Training
from runkey.tracking.mlflow_tracker import Pace
from runkey.tracking.run import begin_run

KEY = f"rk2-{'5' * 64}"
DESCRIPTION = RunDescription(
    name="lr=5e-05", params={"lr": "5e-05", "key": KEY}, tags={"device": "cpu", "key": KEY}
)
QUICK = Pace(flush_seconds=0.2, retry_seconds=0.3, close_seconds=60)


def training_in(folder: Path, device: str = "cpu") -> Training:
    """What is recorded in a folder."""
    description = replace(DESCRIPTION, tags={**DESCRIPTION.tags, "device": device})
    return Training("detection", description, folder, (folder / "train.jsonl",))


def begin(
    store: Store,
    folder: Path,
    say: Callable[[str], None],
    *,
    device: str = "cpu",
    changed: Callable[[LoggedRun], None] = lambda _: None,
    pace: Pace = QUICK,
    root: Path | None = None,
) -> RunTracker:
    """Record a training in a folder, or go on; its workspace is the folder's if None is given."""
    training = training_in(folder, device)
    return begin_run(store, training, root or folder / "workspace", say, changed, pace=pace)


def log_steps(tracker: RunTracker | JsonlLog, first: int, last: int) -> None:
    """The same values in every process."""
    for step in range(first, last + 1):
        values = {f"train/v{n}": math.sin(step * n) for n in range(1, 6)}
        if step % 5 == 0:
            values["val/loss"] = math.nan if step % 20 == 0 else 1 / step
        tracker.log(values, step)
        if step % 7 == 0:
            tracker.event("skipped_step", step=step, image_ids=[step])


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def train(arguments: argparse.Namespace) -> None:
    """Go on from the checkpoint, if there is one, to the last step."""
    folder = Path(arguments.folder)
    checkpoint = folder / "checkpoint.json"
    tracker = begin(Store(arguments.address, arguments.artifacts, folder), folder, say)
    step = 0
    if checkpoint.is_file():
        content = json.loads(checkpoint.read_text())
        step = content["step"]
        tracker.resume(content["position"])
        tracker.event("resumed", step=step)
    else:
        tracker.resume(None)
    while step < arguments.steps:
        step += 1
        log_steps(tracker, step, step)
        if step % arguments.every == 0:
            content = {"step": step, "position": tracker.position()}
            temporary = checkpoint.with_suffix(".new")
            temporary.write_text(json.dumps(content))
            temporary.replace(checkpoint)
        time.sleep(arguments.pause)
    tracker.finish_log()
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
    train(parser.parse_args())


if __name__ == "__main__":
    main()
