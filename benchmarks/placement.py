"""Thirty trainings of several sizes share simulated devices, placed by their predicted memory.

    python -m benchmarks.placement                      # 30 trainings, 2 devices of 3 GiB
    python -m benchmarks.placement --trainings 12 --device-gib 2.5

Each is a real train stage of a tiny project on the CPU. Its request is the bound that the stage
itself would choose its micro-batch by, from a `memory.json` of its parameters. A device is an
amount of main memory: a watcher adds up the resident memory of the processes placed on it, 20 times
a second, and kills the largest when that is more than the device has, as a kernel would. The
executor is the one of `runkey sweep`, with another command.

Device use is the part of the devices' memory that requests hold, over time. With one training a
device it is the mean request, weighted by the trainings' seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from runkey.memory.choose import plan_memory
from runkey.params import Params, load_params, parse_params
from runkey.params.render import render
from runkey.sweep.executor import LocalExecutor, Trial
from runkey.sweep.packing import room_bytes
from runkey.units import GIB
from tests.support.project import TINY, begin_project, clean_environment

KINDS = ((48, 4), (192, 12), (288, 8), (384, 12))
"""Short side of the images, and batch size."""
PAUSE_SECONDS = 0.05


class Trainings(LocalExecutor):
    """The executor of this machine, with train stages in folders of their own as trials."""

    def __init__(self, root: Path, devices: dict[str, int], jobs: int) -> None:
        super().__init__(root, root / "logs", jobs=jobs, devices=devices)
        self.root = root

    def command(self, trial: Trial) -> list[str]:
        """Return the train stage, started in the folder of the trial."""
        folder = str(self.root / trial.key)
        return ["env", "--chdir", folder, sys.executable, "-m", "stages.train"]

    @property
    def placed(self) -> list[tuple[str, Trial, int]]:
        """Device, trial and process of what runs."""
        running = list(self._running.values())
        return [(one.device, one.trial, one.process.pid) for one in running]


class Watcher(threading.Thread):
    """Sees that no device holds more than it has, and keeps what it saw."""

    def __init__(self, executor: Trainings, capacity: int) -> None:
        super().__init__(daemon=True)
        self.executor, self.capacity = executor, capacity
        self.killed: list[str] = []
        self.most: dict[str, int] = {}
        """Peak of each training's resident memory, by key."""
        self.fullest = 0
        self.most_at_once = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Sample until `ended` is set."""
        while not self.ended.wait(PAUSE_SECONDS):
            held: dict[str, list[tuple[int, str, int]]] = {}
            for device, trial, pid in self.executor.placed:
                size = resident_bytes(pid)
                held.setdefault(device, []).append((size, trial.key, pid))
                self.most[trial.key] = max(self.most.get(trial.key, 0), size)
            for trainings in held.values():
                total = sum(size for size, _, _ in trainings)
                self.fullest = max(self.fullest, total)
                self.most_at_once = max(self.most_at_once, len(trainings))
                if total > self.capacity:
                    _, key, pid = max(trainings)
                    self.killed.append(key)
                    os.killpg(pid, 9)


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and those that it started."""
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def parameters(kind: tuple[int, int], seed: int) -> Params:
    """Return those of a training."""
    side, batch = kind
    data = {"short_sides": [side], "long_side": side * 4 // 3}
    return parse_params(
        TINY
        | {
            "seed": seed,
            "data": data,
            "training": {"epochs": 1, "batch_size": batch, "cpu_threads": 1},
            "runtime": TINY["runtime"] | {"mlflow": False, "workers": 0},
        }
    )


def make_folder(source: Path, target: Path, params: Params) -> None:
    """Link a workspace's files into another folder, with other parameters."""
    shutil.copytree(
        source,
        target,
        copy_function=os.link,
        ignore=shutil.ignore_patterns(".git", ".runkey", "tmp", "docs", "tests", "benchmarks"),
    )
    (target / "params.yaml").unlink()
    (target / "params.yaml").write_text(render(params, "# placement"))


def run_stage(folder: Path, stage: str) -> None:
    """Run a stage of a workspace."""
    command = [sys.executable, "-m", f"stages.{stage}"]
    subprocess.run(command, cwd=folder, env=clean_environment(), check=True, capture_output=True)


def make_trials(root: Path, count: int) -> list[Trial]:
    """Make a folder for each training, with the prediction of its memory."""
    base = begin_project(root / "base", parameters(KINDS[0], 0).written())
    run_stage(base.root, "prepare")
    trials = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        predicted = root / f"predicted-{kind[0]}-{kind[1]}"
        if not predicted.exists():
            make_folder(base.root, predicted, parameters(kind, 0))
            run_stage(predicted, "profile_memory")
        key = f"training{number:02}"
        make_folder(predicted, root / key, parameters(kind, number))
        params = load_params(root / key / "params.yaml")
        none = root / "no-trials"
        plan = plan_memory(params, root / key / "memory", torch.device("cpu"), trials=none)
        trials.append(Trial(key, "", (f"{kind[0]}px x{kind[1]}",), plan.needed_bytes))
    return trials


def run(root: Path, trials: list[Trial], devices: int, capacity: int, jobs: int) -> dict[str, Any]:
    """Run the trainings; return what was measured."""
    names = {str(number): room_bytes(capacity) for number in range(devices)}
    executor = Trainings(root, names, jobs)
    watcher = Watcher(executor, capacity)
    watcher.start()
    waiting = sorted(trials, key=lambda one: -(one.peak_bytes or 0))
    peaks = {one.key: one.peak_bytes or 0 for one in trials}
    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    begin, busy_until = time.monotonic(), 0.0
    while waiting or executor.placed:
        for one in executor.poll():
            seconds[one.key] = time.monotonic() - started[one.key]
            if one.code:
                failed[one.key] = one.said
        for trial in list(waiting):
            if executor.has_room(trial):
                waiting.remove(trial)
                started[trial.key] = time.monotonic()
                executor.submit(trial)
        if waiting:
            busy_until = time.monotonic()  # as long as some wait, a device need not be idle
        time.sleep(PAUSE_SECONDS)
    watcher.ended.set()
    held = sum(
        peaks[key] * max(0.0, min(busy_until, started[key] + seconds[key]) - started[key])
        for key in peaks
    )
    use = held / (devices * capacity * (busy_until - begin))
    alone = sum(peaks[key] * seconds[key] for key in peaks) / sum(seconds.values()) / capacity
    ratios = [watcher.most[key] / peaks[key] for key in peaks]
    return {
        "trainings": len(trials),
        "devices": devices,
        "device GiB": capacity / GIB,
        "requests GiB": [round(min(peaks.values()) / GIB, 2), round(max(peaks.values()) / GIB, 2)],
        "seconds": round(time.monotonic() - begin, 1),
        "killed for memory": len(watcher.killed),
        "failed": failed,
        "most at once on a device": watcher.most_at_once,
        "fullest device GiB": round(watcher.fullest / GIB, 2),
        "device use": round(use, 3),
        "device use, one training a device": round(alone, 3),
        "times": round(use / alone, 2),
        "peak / request": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def main() -> None:
    """Run the trainings that the command line asks for, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trainings", type=int, default=30)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device-gib", type=float, default=3.0)
    parser.add_argument("--jobs", type=int, default=8, help="most trainings at once")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="placement-") as name:
        trials = make_trials(Path(name), options.trainings)
        capacity = round(options.device_gib * GIB)
        measured = run(Path(name), trials, options.devices, capacity, options.jobs)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
