"""Images per second of a training on 1, 2, ... processes (GPUs, where there are several).

    python -m benchmarks.ranks --checkout CHECKOUT --processes 1 2 4
    python -m benchmarks.ranks --link 1gbit      # the exchange of gradients beside backward

Runs the real train stage in a checkout whose data are prepared (`dvc repro -s prepare
profile_memory`), `--epochs` epochs each time, and reads the pace of the last one from its log. It
prints a table; the checkout's params.yaml is as before afterwards.

With `--link` (needs root) two machines, namespaces joined by a virtual cable of that rate, take
training steps on one CPU thread each: in turn one whose gradients are sent during the last backward
pass, and one whose gradients are sent after it. `--link none` does not slow the cable down.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu_common import make_batch
from runkey.params import load_params, override, parse_params
from runkey.params.render import render
from runkey.training.build import build_training
from runkey.training.distributed import join_world
from runkey.training.step import train_step
from tests.support.nodes import Network, why_not
from tests.support.project import REPOSITORY, clean_environment

CPU = torch.device("cpu")
CASES = {
    "sample, 4 x 120x160": ("sample", 4, (120, 160)),
    "coco-detr-r50, 1 x 384x384": ("coco-detr-r50", 1, (384, 384)),
}
"""Preset, images of each rank, height and width."""


def measure(checkout: Path, processes: int, epochs: int) -> float:
    """Train for some epochs; return the images per second of the last one."""
    path = checkout / "params.yaml"
    before = path.read_text(encoding="utf-8")
    asked = load_params(path).model_dump()
    asked["runtime"] |= {"processes": processes, "reuse": False, "mlflow": False}
    asked["training"]["epochs"] = epochs
    try:
        path.write_text(render(parse_params(asked), "# benchmark"), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "stages.train"],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        path.write_text(before, encoding="utf-8")
    paces = re.findall(r"([\d.]+) img/s", done.stdout)
    if done.returncode or not paces:
        raise SystemExit(f"{processes} processes: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(paces[-1])


def time_steps(case: str, rounds: int) -> None:
    """Take steps on one rank; rank 0 prints the milliseconds of each kind as JSON."""
    preset, images, size = CASES[case]
    common = {"model.backbone_weights": "none", "training.cpu_threads": 1}
    params = override(load_params(REPOSITORY / f"presets/{preset}.yaml"), common)
    torch.set_num_threads(1)
    with join_world(CPU) as world:
        torch.manual_seed(0)
        parts = build_training(params, 10, CPU, world=world).step
        batch = make_batch(world.rank, images, size, padded=False)
        overlap = parts.exchange.overlap
        times: dict[str, list[float]] = {"during": [], "after": []}
        for step in range(-1, rounds):
            for kind in times:
                parts.exchange.overlap = overlap if kind == "during" else nullcontext  # type: ignore[method-assign]
                world.gather(None)
                began = time.perf_counter()
                train_step(parts, (batch,), 1.0, reseed=partial(parts.reseed, 0, step, world.rank))
                if step >= 0:  # the first ones allocate
                    times[kind].append(1e3 * (time.perf_counter() - began))
        if world.is_main:
            print(json.dumps(times), flush=True)


def compare(link: str, case: str, rounds: int) -> dict[str, list[float]]:
    """Run `time_steps` on two machines joined by a cable of some rate."""
    with Network(2) as network, tempfile.TemporaryDirectory() as folder:
        if link != "none":
            # The queue holds a bucket, so that nothing is sent twice.
            shape = ("tbf", "rate", link, "burst", "256kb", "limit", "64mb")
            network.nodes[1].shape(*shape)
        logs = [Path(folder, f"{rank}.log") for rank in range(2)]
        started = []
        for rank, node in enumerate(network.nodes):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": network.nodes[0].address,
                "MASTER_PORT": "29500",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(REPOSITORY),
            }
            command = ["-m", "benchmarks.ranks", "--steps", case, "--rounds", str(rounds)]
            with logs[rank].open("wb") as log:
                environment = clean_environment() | place
                started.append(node.start([sys.executable, *command], REPOSITORY, environment, log))
        for process in started:
            process.wait(3600)
        said = logs[0].read_text().splitlines()
        if not said or any(process.returncode for process in started):
            raise SystemExit(f"{case}: {[log.read_text()[-2000:] for log in logs]}")
        found: dict[str, list[float]] = json.loads(said[-1])
        return found


def print_comparison(link: str, cases: list[str], rounds: int) -> None:
    """Print a table of medians and quartiles."""
    if reason := why_not():
        raise SystemExit(f"ranks: {reason}")
    print("| each rank | cable | sent after backward, ms | during it, ms | less time |")
    print("|---|---|---|---|---|")
    for case in cases:
        found = compare(link, case, rounds)
        cells = []
        for kind in ("after", "during"):
            low, _, high = torch.tensor(found[kind]).quantile(torch.tensor([0.25, 0.5, 0.75]))
            cells.append(f"{median(found[kind]):.0f} ({low:.0f} to {high:.0f})")
        less = 1 - median(found["during"]) / median(found["after"])
        print(f"| {case} | {link} | {' | '.join(cells)} | {less:.0%} |", flush=True)
    print(f"\nload: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--link", help="rate of the cable: 1gbit, none, ...")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind")
    parser.add_argument("--steps", choices=CASES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.steps:
        return time_steps(asked.steps, asked.rounds)
    if asked.link:
        return print_comparison(asked.link, asked.cases, asked.rounds)
    if not asked.checkout:
        parser.error("--checkout or --link is needed")
    print("| processes | images/s | times one process |\n|---|---|---|")
    first = 0.0
    for processes in asked.processes:
        pace = measure(asked.checkout, processes, asked.epochs)
        first = first or pace
        print(f"| {processes} | {pace:.1f} | {pace / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
