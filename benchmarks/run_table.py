"""Run the whole pipeline in fresh clones and write down what it took and what came out.

    python benchmarks/run_table.py sample-seed-0 sample-seed-0-again sample-seed-1
    python benchmarks/run_table.py blood-cells coco-tiny --images ../shared/data
    python benchmarks/run_table.py --table              # the table of all results so far

Each case clones the repository as it is committed, puts its preset, seed and data in place as a
user would, types `make repro`, and leaves benchmarks/results/pipeline/<case>.json.  Times are wall
times: run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "pipeline"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    preset: str
    seed: int = 0
    images: str = ""
    """Folder under --images that takes the place of data/; empty: the sample data."""
    epochs: int | None = None
    """Epochs in place of the preset's."""


CASES = {
    "sample-seed-0": Case("sample"),
    "sample-seed-0-again": Case("sample"),
    "sample-seed-1": Case("sample", seed=1),
    "sample-seed-2": Case("sample", seed=2),
    "sample-seed-3": Case("sample", seed=3),
    "blood-cells": Case("blood-cells", images="blood-cells"),
    "coco-tiny": Case("blood-cells", images="coco-tiny", epochs=4),
}


def run_case(name: str, case: Case, images: Path, keep: Path | None) -> None:
    """Clone, set up, `make repro`, and write the result."""
    with tempfile.TemporaryDirectory(prefix="runkey-") as folder:
        clone = (keep or Path(folder)).resolve() / name
        _call("git", "clone", "--quiet", str(REPOSITORY), str(clone), cwd=REPOSITORY)
        commit = _call("git", "rev-parse", "--short", "HEAD", cwd=clone).strip()
        _put_in_place(clone, case, images)
        started = time.perf_counter()
        _call("make", "repro", cwd=clone, log=RESULTS / f"{name}.log")
        seconds = time.perf_counter() - started
        result = {"case": name, "commit": commit, "seed": case.seed, "machine": machine()}
        result |= {"make_repro_seconds": round(seconds, 1)} | _outcome(clone)
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, sort_keys=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def _put_in_place(clone: Path, case: Case, images: Path) -> None:
    """The preset, the seed, and the user's own data, as README says."""
    _call(sys.executable, "-m", "runkey", "preset", case.preset, cwd=clone)
    _set(clone / "params.yaml", "seed", case.seed)
    if case.epochs is not None:
        _set(clone / "params.yaml", "  epochs", case.epochs)
    if case.images:
        shutil.copytree(images / case.images, clone / "data", dirs_exist_ok=True)
        _call("make", "env", cwd=clone)
        _call(".venv/bin/dvc", "add", "--quiet", "data", cwd=clone)


def _set(params: Path, name: str, value: int) -> None:
    text = params.read_text(encoding="utf-8")
    text, changed = re.subn(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
    assert changed == 1, f"{name} occurs {changed} times in {params}"
    params.write_text(text, encoding="utf-8")


def _outcome(clone: Path) -> dict[str, Any]:
    """Metrics and the hash of the weights."""
    return {
        "train": json.loads((clone / "metrics" / "train.json").read_text(encoding="utf-8")),
        "evaluate": json.loads((clone / "metrics" / "evaluate.json").read_text(encoding="utf-8")),
        "weights_sha256": hashlib.sha256(
            (clone / "model/weights.safetensors").read_bytes()
        ).hexdigest(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores and versions that times and bits depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def _call(*command: str, cwd: Path, log: Path | None = None) -> str:
    """Run a command without the surrounding environment's DVC and virtual environment."""
    own = ("DVC_", "VIRTUAL_ENV", "MLFLOW_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout.replace(str(cwd), "."), encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def table() -> str:
    """All results as a Markdown table."""
    rows = [
        "| case | commit | AP | AP50 | `make repro` | training | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        scores, train = result["evaluate"], result["train"]
        rows.append(
            f"| {result['case']} | {result['commit']} | {scores['AP']:.3f} | {scores['AP50']:.3f} "
            f"| {result['make_repro_seconds']:.0f} s | {train['seconds']:.0f} s "
            f"| `{result['weights_sha256'][:12]}` |"
        )
    return "\n".join(rows)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--images", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--keep", type=Path, help="folder to clone into and leave the clones in")
    parser.add_argument("--table", action="store_true", help="print the table of all results")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    for name in arguments.cases:
        run_case(name, CASES[name], arguments.images, arguments.keep)
    if arguments.table:
        print(table())


if __name__ == "__main__":
    main()
