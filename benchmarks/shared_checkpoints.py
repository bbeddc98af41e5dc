"""What it costs to send checkpoints to a server: processor time, bytes, and a training's steps.

    python -m benchmarks.shared_checkpoints [--megabytes 8 500] [--seconds 20]

A real `mlflow server` on this machine keeps artifacts in a folder. For each size a folder gets
checkpoints of so many megabytes, with best weights of a third of them, written as training writes
them, and the sender that trainings have sends the first one, then further ones. Beside it runs a
stand-in for a training, a loop of small convolutions on one thread, in turns of `--seconds` with
and without sending; a step's time is that of its own thread on the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from runkey.files import write_atomically
from runkey.pipeline.share import CheckpointSender
from runkey.registry.checkpoints import SharedFolder
from runkey.registry.library import ServerLibrary
from runkey.registry.rest import RestClient
from runkey.tracking.store import Store, free_port, start_server, stop_server, wait_until_healthy
from runkey.training.checkpoint import Checkpoint, FolderCheckpoints, Interval
from runkey.training.state import Best, LoopState
from runkey.units import counted
from tests.support.records import key_of

FINGERPRINT = {"micro_batch": 4, "world_size": 1, "device": "cpu", "precision": "off"}


@contextlib.contextmanager
def server(root: Path) -> Iterator[str]:
    """A real MLflow server, which keeps the artifacts itself; its address."""
    port = free_port()
    with contextlib.chdir(root):
        process = start_server(Store(f"sqlite:///{root / 'mlflow.db'}", None, root), port)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_server(process)


class Folder:
    """A folder of checkpoints of one size."""

    def __init__(self, path: Path, megabytes: float, key: str) -> None:
        path.mkdir()
        self.path, self.step, self.key = path, 0, key
        count = int(megabytes * 1e6 / 4 / 64)
        self.tensors = {f"{n}": torch.rand(count) for n in range(64)}
        self.best = {n: self.tensors[n] for n in list(self.tensors)[:21]}
        self.checkpoints = FolderCheckpoints(path, FINGERPRINT | {"key": key}, interval=Interval(0))
        write_atomically(path / "train.jsonl", "")

    def save(self, *, anchor: bool = False) -> None:
        """Write the next checkpoint."""
        self.step += 1
        state = LoopState(step=self.step, best=Best({"val/AP": 0.5}, 1, 1))
        parts = {"model": self.tensors}
        checkpoint = Checkpoint(self.step, state.as_plain(), parts, {}, self.best)
        self.checkpoints.save(checkpoint, wait=True, anchor=anchor)


def make_place(client: RestClient, key: str) -> SharedFolder:
    """A run of the key, to which checkpoints may be sent."""
    where = client.post("experiments/create", {"name": key[:12]})["experiment_id"]
    tags = [{"key": "key", "value": key}]
    made = client.post("runs/create", {"experiment_id": where, "start_time": 1, "tags": tags})
    run = client.run(str(made["run"]["info"]["run_id"]))
    assert run
    return SharedFolder(client, run)


def steps_for(seconds: float, is_over: Callable[[], bool] = lambda: True) -> float:
    """Milliseconds of this thread's processor time that a step of the stand-in takes."""
    layer = torch.nn.Conv2d(16, 16, 3)
    images, count = torch.rand(8, 16, 64, 64), 0
    wall, began = time.monotonic(), time.thread_time()
    while time.monotonic() - wall < seconds or not is_over():
        layer(images).square().mean().backward()
        count += 1
    return (time.thread_time() - began) / count * 1000


def measure(megabytes: float, seconds: float, rounds: int, work: Path) -> list[str]:
    """Send checkpoints of one size; the cells of the table's row."""
    key = key_of(str(megabytes))
    with server(work) as address:
        library = ServerLibrary(address, work / "home")
        place = make_place(library.client, key)
        folder = Folder(work / "training", megabytes, key)
        folder.save(anchor=True)
        folder.save()
        sender = CheckpointSender(folder.path, lambda: place, key=key, generation=1, seconds=0.0)
        sender.start()
        costs, sizes, walls = [], [], []

        def wait_for(step: int) -> None:
            began = time.monotonic()
            before = sender.bytes_sent
            while not (sender.sent and sender.sent.step == step and sender.bytes_sent > before):
                time.sleep(0.05)
            walls.append(time.monotonic() - began)
            time.sleep(0.5)  # until it has counted its time
            costs.append(sender.cost_seconds)
            sizes.append((sender.bytes_sent - before) / 1e6)

        wait_for(2)
        ratios = []
        steps_for(seconds / 4)  # warm up
        for number in range(rounds):
            without = steps_for(seconds) if number % 2 else 0.0
            folder.save()
            began = sender.sent
            with_it = steps_for(seconds, lambda began=began: sender.sent is not began)
            time.sleep(0.5)
            costs.append(sender.cost_seconds)
            sizes.append(sender.bytes_sent / 1e6 - sum(sizes))
            ratios.append(with_it / (without or steps_for(seconds)) - 1)
        sender.abandon()
    later = statistics.median(costs[1:])
    interval = max(600.0, later / 0.01)
    return [
        f"{megabytes:g} MB",
        f"{sizes[0]:.0f} MB, {costs[0]:.2f} s",
        f"{statistics.median(sizes[1:]):.0f} MB, {later:.2f} s",
        f"{walls[0]:.1f} s",
        f"{later / interval:.3%} of {interval:.0f} s",
        f"{statistics.median(ratios):+.2%} ({', '.join(f'{one:+.1%}' for one in ratios)})",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[8, 500])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{counted(os.cpu_count() or 1, 'core')}, {platform.machine()}"
    print(f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| checkpoint | first sending | each further one | the first took | share | a step |")
    print("|---|---|---|---|---|---|")
    for megabytes in chosen.megabytes:
        with tempfile.TemporaryDirectory() as name:
            cells = measure(megabytes, chosen.seconds, chosen.rounds, Path(name))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
