"""The open checks that need a GPU, most valuable first, in at most twelve minutes.

    make gpu-checks                                        # all
    python3 -m benchmarks.gpu_checks G3 G9 --out FOLDER     # some; --minutes 9 for less time
    python3 -m benchmarks.gpu_checks --device cpu           # tries the script itself, on tiny sizes

G3: a training step of R50, 16 images at 800 x 1333, against the reference DETR, in bf16, TF32 and
fp32.  G9: where such a step's time goes, and the sample preset's.  G7: inference.  G4: host syncs
of a training step.  G10: predicted and measured memory with other bodies.

Each check runs in a process of its own within its time, and writes FOLDER/<name>.json after every
number.  One that fails ends none of the others; the exit code is 1 then.  A bare machine will do:
its own torch, no mlflow, dvc or pycocotools.  The reference is a clone (`make reference`); without
it, G3 measures runkey alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_common import Report, about
from benchmarks.gpu_memory import check_bodies
from benchmarks.gpu_speed import check_inference, check_profile, check_training_step
from benchmarks.gpu_training import check_syncs

Check = Callable[[torch.device, Report, Path], None]
"""(device, where numbers go, clone of the reference)."""


def check_host_syncs(device: torch.device, report: Report, _: Path) -> None:
    """G4: syncs of a step."""
    report.add("syncs", check_syncs(device))


CHECKS: dict[str, tuple[str, Check, float]] = {
    "G3": ("training_step", check_training_step, 230),
    "G9": ("step_profile", check_profile, 110),
    "G7": ("inference", check_inference, 170),
    "G4": ("training_syncs", check_host_syncs, 50),
    "G10": ("memory_bodies", check_bodies, 160),
}
"""The name of the file, the check, and its share of the time in seconds of twelve minutes."""
_GRACE_SECONDS = 25
"""After which a check that does not end by itself is killed."""


def main() -> None:
    """Run the checks, each in a process of its own, or one of them in this."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checks", nargs="*", default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--reference", type=Path, default=Path(".reference/detr"))
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if unknown := set(chosen.checks) - set(CHECKS):
        parser.error(f"no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.until is not None:
        run_here(chosen.checks[0], chosen)
        return
    sys.exit(1 if run_all(chosen) else 0)


def run_here(name: str, chosen: argparse.Namespace) -> None:
    """Run one check in this process."""
    file, check, _ = CHECKS[name]
    device = torch.device(chosen.device)
    path = chosen.out / f"{file}.json"
    report = Report(path, {"check": name} | about(device), chosen.until)
    check(device, report, chosen.reference)
    report.end()


def run_all(chosen: argparse.Namespace) -> list[str]:
    """Run the checks in turn; return those that failed.  Later ones get what one leaves."""
    ends = time.monotonic() + 60 * chosen.minutes - _GRACE_SECONDS
    failed, later = [], sum(CHECKS[name][2] for name in chosen.checks)
    for name in chosen.checks:
        share = CHECKS[name][2]
        seconds = max(ends - time.monotonic(), 0) * share / later
        later -= share
        command = [sys.executable, "-m", "benchmarks.gpu_checks", name, "--device", chosen.device]
        command += ["--out", str(chosen.out), "--reference", str(chosen.reference)]
        start = time.monotonic()
        try:
            code = subprocess.run(
                [*command, "--until", f"{start + seconds}"], timeout=seconds + _GRACE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        how = {0: "done", None: "KILLED, over its time"}.get(code, f"FAILED, exit code {code}")
        print(f"{name}: {how}, {time.monotonic() - start:.0f} of {seconds:.0f} s", flush=True)
        if code != 0:
            failed.append(name)
    return failed


if __name__ == "__main__":
    main()
