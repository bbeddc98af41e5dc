"""The sample pipeline on a GPU, all four stages, beside the same on that machine's CPU.

    python3 -m benchmarks.gpu_pipeline --runs RUNS --out benchmarks/results/gpu

Runs what RUNS does not have yet (3 seeds each, one after the other; 3 minutes a seed on an H200 and
its CPU), with MLflow where it is installed, and writes pipeline.json: AP by seed, speed, share of
waiting, and what the samples say of the GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_common import about
from benchmarks.techniques.collect import read_runs
from benchmarks.techniques.run import run_all
from benchmarks.techniques.variants import BY_NAME
from runkey.plots.log import read_log

_SAMPLED = {
    "gpu_busy_percent": "system/gpu_0_utilization_percentage",
    "gpu_memory_megabytes": "system/gpu_0_memory_usage_megabytes",
    "cpu_busy_percent": "system/cpu_utilization_percentage",
    "training_memory_megabytes": "system/process_memory_megabytes",
}
_KEPT = (
    "seed", "AP", "AP50", "AP75", "seconds", "stage_seconds", "images_per_second",
    "data_wait_share", "skipped_steps", "memory", "AP_of",
)  # fmt: skip


def summarise(runs: Path) -> dict[str, Any]:
    """What pipeline.json says, from the folders of `techniques run`."""
    found: dict[str, Any] = {}
    for run, row in read_runs(runs):
        if row["variant"] in ("baseline", "gpu", "gpu-fp32", "gpu-fp16"):
            entry = {name: row[name] for name in _KEPT if name in row} | _samples(run)
            found.setdefault(row["variant"], {"machine": row["machine"], "runs": []})
            found[row["variant"]]["runs"].append(entry)
    for kind in found.values():
        values = [run["AP"] for run in kind["runs"]]
        kind["AP"] = {"least": min(values), "mean": float(np.mean(values)), "most": max(values)}
    return found


def _samples(run: Path) -> dict[str, float]:
    """Medians over a training."""
    points = read_log(run / "logs" / "train.jsonl").samples
    return {
        name: float(np.median([p.values[metric] for p in points if metric in p.values]))
        for name, metric in _SAMPLED.items()
        if any(metric in p.values for p in points)
    }


def main() -> None:
    """Read the command line, run what is missing, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        jobs = [(BY_NAME[name], seed) for seed in range(3) for name in ("gpu", "baseline")]
        mlflow = importlib.util.find_spec("mlflow") is not None
        run_all(jobs, arguments.runs, 1, mlflow, 1e9)
    result = {"beside": arguments.beside} | summarise(arguments.runs)
    if torch.cuda.is_available():
        result = about(torch.device("cuda")) | result
    path = arguments.out / "pipeline.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print({name: kind["AP"] for name, kind in result.items() if isinstance(kind, dict)})


if __name__ == "__main__":
    main()
