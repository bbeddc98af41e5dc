"""Images per second of a training on 1, 2, ... processes (GPUs, where there are several).

    python -m benchmarks.ranks --checkout CHECKOUT --processes 1 2 4

Runs the real train stage in a checkout whose data are prepared (`dvc repro -s prepare
profile_memory`), `--epochs` epochs each time, and reads the pace of the last one from its log. It
prints a table; the checkout's params.yaml is as before afterwards.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from runkey.params import load_params, parse_params
from runkey.params.render import render


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    asked = parser.parse_args()
    print("| processes | images/s | times one process |\n|---|---|---|")
    first = 0.0
    for processes in asked.processes:
        pace = measure(asked.checkout, processes, asked.epochs)
        first = first or pace
        print(f"| {processes} | {pace:.1f} | {pace / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
