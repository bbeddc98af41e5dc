"""Run variants: the four stages, each in a folder of its own, and what came of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.run_table import machine
from benchmarks.techniques.outcome import outcome
from benchmarks.techniques.variants import BASELINE, Variant
from runkey.params.render import render_preset

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("runkey", "stages")
BESIDE = ("conda-lock.yml", "dvc.yaml", "data.dvc", "data")
STAGES = ("prepare", "profile_memory", "train", "evaluate")
RESULT = "result.json"


def run_all(
    jobs: Sequence[tuple[Variant, int]], out: Path, parallel: int, mlflow: bool, deadline: float
) -> None:
    """Run variants beside each other; those that have a result are left out.

    Args:
        jobs: variant and seed.
        out: the folder of all; a folder for each job comes to be in it.
        parallel: how many at a time.
        mlflow: record them in MLflow too, each in its own store.
        deadline: seconds from now on; what has not begun by then is not begun.
    """
    end = time.monotonic() + deadline

    def run(job: tuple[Variant, int]) -> None:
        if time.monotonic() < end:
            variant, seed = job
            print(run_one(variant, seed, out / f"{variant.name}-{seed}", mlflow=mlflow), flush=True)

    todo = [job for job in jobs if not (out / f"{job[0].name}-{job[1]}" / RESULT).exists()]
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run, todo))


def run_one(variant: Variant, seed: int, folder: Path, *, mlflow: bool) -> str:
    """Run one variant; write result.json into its folder.

    Returns:
        A line about it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in CODE:  # copies: code that is imported from elsewhere is warned of
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("*.pyc"))
    for part in BESIDE:
        (folder / part).symlink_to(REPOSITORY / part)
    _write_params(variant, seed, folder / "params.yaml", mlflow=mlflow)
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    failed = ""
    for stage in STAGES:
        started = time.perf_counter()
        code, cpu_seconds[stage] = _run_stage(stage, variant, folder)
        seconds[stage] = round(time.perf_counter() - started, 1)
        if code:
            failed = f"{stage} ended with {code}"
            break
    result = {
        "variant": variant.name,
        "seed": seed,
        "settings": variant.settings,
        "machine": _machine(variant.device),
        "stage_seconds": seconds,
        "stage_cpu_seconds": cpu_seconds,
        "failed": failed,
    } | outcome(folder)
    text = json.dumps(result, indent=2)
    (folder / RESULT).write_text(text + "\n", encoding="utf-8")
    return f"{variant.name}-{seed}: {failed or result['AP']} {seconds}"


def _write_params(variant: Variant, seed: int, path: Path, *, mlflow: bool) -> None:
    yaml = YAML()
    params = yaml.load(render_preset("sample"))
    fixed = {
        "seed": seed,
        "runtime.device": variant.device,
        "runtime.mlflow": mlflow,
        "runtime.progress": False,
        "runtime.system_metrics_seconds": 1.0 if mlflow else 0.0,
    }
    for name, value in (fixed | BASELINE | variant.settings).items():
        *sections, last = name.split(".")
        place: Any = params
        for section in sections:
            place = place[section]
        assert last in place, name
        place[last] = value
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def _run_stage(stage: str, variant: Variant, folder: Path) -> tuple[int, float]:
    """The exit status, and the seconds of processor time that it and its children took."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DVC_", "MLFLOW_"))
    }
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    if variant.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (folder / f"{stage}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}"],
            cwd=folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, round(used.ru_utime + used.ru_stime, 1)


def _machine(device: str) -> dict[str, Any]:
    facts = machine()
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["gpu"] = subprocess.run(
            asked, capture_output=True, text=True, check=True
        ).stdout.strip()
    return facts
