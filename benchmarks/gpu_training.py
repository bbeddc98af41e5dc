"""GPU checks of training: host syncs of a step, a step that is not finite, kill -9 and resume.

    python3 -m benchmarks.gpu_training [syncs] [skip] [resume] [--out benchmarks/results/gpu]

G4 (syncs), G6 (skip) and G5 (resume) of the checks that need a GPU.  They run on a bare machine:
its own torch, no mlflow, dvc or pycocotools.  Each writes a JSON file with what it measured, the
device, the driver and the versions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_common import about
from benchmarks.gpu_resume import check_resume, train_to_the_end
from benchmarks.gpu_syncs import check_skip, check_syncs


def main() -> None:
    """Run the checks named, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", default=list(CHECKS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if chosen.worker:
        train_to_the_end(chosen.worker, device)
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.checks:
        started = time.perf_counter()
        result = CHECKS[name](device)
        result |= {"seconds": round(time.perf_counter() - started, 1)} | about(device)
        text = json.dumps(result, indent=1) + "\n"
        (chosen.out / f"training_{name}.json").write_text(text, encoding="utf-8")
        print(name, {k: v for k, v in result.items() if not isinstance(v, list)}, flush=True)


CHECKS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "syncs": check_syncs,
    "skip": check_skip,
    "resume": check_resume,
}


if __name__ == "__main__":
    main()
