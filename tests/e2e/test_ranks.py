"""The train stage on two processes: started by the stage itself and by torchrun, killed, reused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from runkey.errors import TRY_ELSEWHERE
from runkey.hashing import sha256_file
from tests.support.project import TINY, Project, begin_project, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAGE = ("-m", "stages.train")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *STAGE)


def set_params(project: Any, **values: object) -> None:
    """Change scalars of params.yaml, wherever they stand; the names are unique there."""
    path: Path = project.root / "params.yaml"
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        name = line.split(":")[0].strip()
        if name in values:
            indent = line[: len(line) - len(line.lstrip())]
            lines[number] = f"{indent}{name}: {values[name]}"
    path.write_text("\n".join(lines) + "\n")


def weights_of(project: Any) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted((project.root / "model").iterdir())}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A repository whose data are prepared, that asks for two processes."""
    runtime = {"processes": 2, "checkpoint_seconds": 0, "device": "cpu"}
    training = {"epochs": 12, "evaluate_every": 4, "early_stopping": {"enabled": False}}
    asked = TINY | {"training": TINY["training"] | training, "runtime": TINY["runtime"] | runtime}
    copied = begin_project(tmp_path_factory.mktemp("ranks") / "repository", asked)
    for stage in ("prepare", "profile_memory"):
        copied.run(sys.executable, "-m", f"stages.{stage}")
    return copied


@pytest.fixture(scope="module")
def whole(project: Project) -> str:
    """What the stage prints, as `dvc repro` starts it."""
    return project.run(sys.executable, *STAGE).stdout


def test_the_stage_starts_the_ranks(project, whole):
    assert whole.count("2 processes, this one on device cpu") == 1
    assert whole.count("epoch 12/12") == 1
    assert "[Gloo]" not in whole
    assert project.json("run.json")["witness"]["world_size"] == 2


def test_ranks_of_torchrun_take_a_result_that_is_there(project, whole):
    before = weights_of(project)
    done = project.run(sys.executable, *TORCHRUN)
    assert done.stdout.count("is reused") == 1
    assert weights_of(project) == before


def test_a_killed_rank_ends_the_stage_and_repeated_it_gives_the_same_model(project, whole):
    before = weights_of(project)
    set_params(project, reuse="false")
    training = subprocess.Popen(
        [sys.executable, *STAGE],
        cwd=project.root,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert training.stdout
    for line in training.stdout:
        if line.startswith("epoch  3/12"):
            break
    follower = next(
        child
        for child in psutil.Process(training.pid).children()
        if child.environ().get("RANK") == "1"
    )
    os.kill(follower.pid, signal.SIGKILL)
    killed = time.monotonic()
    _, said = training.communicate(timeout=200)
    assert training.returncode == TRY_ELSEWHERE
    assert time.monotonic() - killed < 60  # on a machine that is busy with other tests
    line = said.splitlines()[-1]
    assert line.startswith(f"error: rank 1 (process {follower.pid} on ")
    assert "ended while training; " in line
    assert line.endswith("; `dvc repro` goes on from there")
    assert "Traceback" not in said
    again = project.run(sys.executable, *STAGE)
    assert "resuming after step" in again.stdout
    assert weights_of(project) == before
    set_params(project, reuse="true")


def test_torchrun_trains(project, whole):
    set_params(project, seed=6, epochs=1)
    done = project.run(sys.executable, *TORCHRUN)
    assert done.stdout.count("2 processes, this one on device cpu") == 1
    assert project.json("run.json")["witness"]["world_size"] == 2


@pytest.mark.gpu
def test_two_gpus_train_over_nccl_and_give_the_same_model_again(tmp_path):
    """Where there are two; nobody has run this yet."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    asked = {"runtime": TINY["runtime"] | {"processes": 2, "device": "cuda", "reuse": False}}
    asked["training"] = TINY["training"] | {"deterministic": True}
    project = begin_project(tmp_path / "repository", TINY | asked)
    for stage in ("prepare", "profile_memory", "train"):
        project.run(sys.executable, "-m", f"stages.{stage}")
    assert project.json("run.json")["witness"]["world_size"] == 2
    first = weights_of(project)["weights.safetensors"]
    project.run(sys.executable, *STAGE)
    assert weights_of(project)["weights.safetensors"] == first
