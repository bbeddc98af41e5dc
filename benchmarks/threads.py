"""Threads of arithmetic on a CPU: seconds of a training step of the sample preset, paired.

    python benchmarks/threads.py --prepared CHECKOUT [--rounds 5] [--steps 40]

CHECKOUT is a repository whose `prepare` has run.  Every round measures each setting once, in a
process of its own and in turn, so that what else the machine does meets all of them alike.
`results/threads.md` is written anew.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "threads.md"
SETTINGS = {"1": (1, "PASSIVE"), "2, sleeping": (2, "PASSIVE"), "2, spinning": (2, "ACTIVE")}
WARM_UP = 5


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(_step_seconds(chosen.prepared, chosen.worker, chosen.steps))
        return
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(chosen.rounds):
        for name, (threads, policy) in SETTINGS.items():
            command = [sys.executable, __file__, "--prepared", str(chosen.prepared)]
            command += ["--worker", str(threads), "--steps", str(chosen.steps)]
            environment = os.environ | {"OMP_WAIT_POLICY": policy, "PYTHONPATH": str(REPOSITORY)}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            seconds[name].append(float(done.stdout.split()[-1]))
            print(f"round {number + 1}, {name}: {seconds[name][-1] * 1000:.0f} ms", flush=True)
    RESULT.write_text(_table(seconds, chosen.rounds, chosen.steps), encoding="utf-8")


def _step_seconds(root: Path, threads: int, steps: int) -> float:
    """Median of a whole step of the sample preset: forward, backward, clipping, optimizer, EMA."""
    import torch

    from runkey import paths
    from runkey.data.index import read_classes
    from runkey.params import load_params
    from runkey.pipeline.step_factory import build_step
    from runkey.training.build import TrainData, build_loader

    params = load_params(REPOSITORY / "presets" / "sample.yaml")
    runtime = params.runtime.model_copy(update={"workers": 0, "prefetch": 1, "pin_memory": False})
    training = params.training.model_copy(update={"cpu_threads": threads, "deterministic": True})
    params = params.model_copy(update={"runtime": runtime, "training": training})
    device, names = torch.device("cpu"), read_classes(root / paths.PREPARED / "classes.json")
    data = TrainData(root, [one.name for one in names], params.training.batch_size)
    loader = build_loader(params, data, device)
    step = build_step(params, len(names), device).step
    taken = []
    for number, window in zip(range(WARM_UP + steps), loader.epoch(0), strict=False):
        start = time.perf_counter()
        step(window)
        if number >= WARM_UP:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _table(seconds: dict[str, list[float]], rounds: int, steps: int) -> str:
    base = statistics.median(seconds["1"])
    rows = [
        f"| {name} | {statistics.median(taken) * 1000:.0f} | {min(taken) * 1000:.0f} |"
        f" {max(taken) * 1000:.0f} | {statistics.median(taken) / base:.2f} |"
        for name, taken in seconds.items()
    ]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return "\n".join(
        [
            "# Threads of arithmetic, sample preset",
            "",
            f"`python benchmarks/threads.py --prepared CHECKOUT --rounds {rounds} --steps {steps}`,"
            f" {time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores ({platform.machine()}), Python"
            f" {platform.python_version()}; load at the end {load}.  A process a measurement, in"
            " turn; each gives the median of its steps (batch 8, 120 x 160).",
            "",
            "| threads | ms a step, median of rounds | least | most | against 1 thread |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
