"""`runkey sweep` on Ray and Slurm: node and driver are killed, and 8 keys are trained once."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runkey.identity.record import RESUMED_AFTER
from runkey.params.schema import Runtime
from runkey.paths import TRAIN_LOG
from tests.support.points import read_jsonl
from tests.support.project import (
    REPOSITORY,
    TINY,
    Project,
    begin_project,
    clean_environment,
    wait_for,
)
from tests.support.ray_nodes import RayCluster, needs_ray
from tests.support.slurm import Slurm, needs_slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

POINTS = ("-S", "lr=1e-4,2e-4,3e-4,4e-4", "-S", "seed=0,1")
# 60 steps, of which each is kept: what is lost is at most the step that ran.
RUNTIME = {"log_every": 1, "checkpoint_seconds": 0.0}
if "share_checkpoint_minutes" in Runtime.model_fields:
    RUNTIME["share_checkpoint_minutes"] = 1e-5
PARAMS = TINY | {
    "training": {"epochs": 20, "batch_size": 4, "evaluate_every": 10},
    "runtime": TINY["runtime"] | RUNTIME,
}
PATIENCE = 1800.0


@dataclass
class Killed:
    """What was known when a node was killed."""

    steps: dict[str, int]
    """Last step of each training that ran on it, by key."""
    most: int = 1
    """Steps that may be lost."""


class Driver:
    """`runkey sweep` in a checkout."""

    def __init__(self, project: Project, on: str, environment: Mapping[str, str]) -> None:
        self.project, self.on, self.environment = project, on, environment
        self.said = project.root.parent / "said.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "runkey", "sweep", "--json", "--on", self.on, *POINTS]
        with self.said.open("ab") as said, (self.said.with_name("answer.json")).open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=self.project.root,
                env=clean_environment() | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=said,
            )

    def kill(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def answer(self) -> dict[str, Any]:
        assert self.process
        assert self.process.wait(PATIENCE) == 0, self.said.read_text()[-4000:]
        answer: dict[str, Any] = json.loads(self.said.with_name("answer.json").read_text())
        return answer

    def has_ended(self, count: int) -> bool:
        assert self.process
        assert self.process.poll() is None, self.said.read_text()[-4000:]
        return self.said.read_text().count("  finished, AP") >= count


def steps_of(root: Path) -> dict[str, int]:
    """The last logged step of each training in a checkout, by key."""
    found = {}
    for log in root.glob(f".runkey/rk2-*/{TRAIN_LOG.name}"):
        steps = [one["step"] for one in read_jsonl(log) if "values" in one and "step" in one]
        if steps:
            found[log.parent.name] = max(steps)
    return found


def is_in_the_middle(root: Path) -> bool:
    return any(6 <= step <= 40 for step in steps_of(root).values())


def sent_of(clone: Path) -> dict[str, int]:
    """The last step that each unfinished training of a node sent to the server, by key."""
    found = {}
    for log in clone.glob(".runkey/sweeps/*/rk2-*.log"):
        text = log.read_text()
        if (steps := re.findall(r"checkpoint of step (\d+)", text)) and "published" not in text:
            found[log.stem] = int(steps[-1])
    return {key: step for key, step in found.items() if steps_of(clone).get(key, 60) < 60}


def check(driver: Driver, killed: Killed, seconds: dict[str, float]) -> None:
    """Eight finished runs, none twice, and at most a step lost of each that was killed."""
    points = driver.answer()["points"]
    keys = [one["key"] for one in points]
    assert [one["state"] for one in points] == ["finished"] * 8
    assert len(set(keys)) == 8
    command = (sys.executable, "-m", "runkey", "list", "--json", "--limit", "100")
    runs = json.loads(driver.project.run(*command, env=driver.environment).stdout)
    assert sorted(one["key"] for one in runs if one["run"]["status"] == "FINISHED") == sorted(keys)
    lost = {}
    for one in runs:
        if (key := one["key"]) in killed.steps:
            after = re.search(r"step (\d+)", one["run"]["tags"].get(RESUMED_AFTER, "step 0"))
            assert after
            lost[key[:12]] = killed.steps[key] - int(after[1])
    told = {name: round(value) for name, value in seconds.items()}
    sys.stdout.write(f"{driver.on}: {told}, steps lost: {lost}\n")
    assert lost
    assert max(lost.values()) <= killed.most, lost


@needs_slurm
def test_slurm(slurm: Slurm, tmp_path: Path) -> None:
    project = begin_project(tmp_path / "repository", PARAMS)
    project.dvc("repro", "profile_memory")  # what a trial takes, so that two share the node
    driver = Driver(project, "slurm", slurm.environment)
    start = time.monotonic()
    driver.start()
    wait_for(lambda: driver.has_ended(2), "two trials", PATIENCE)
    wait_for(lambda: is_in_the_middle(project.root), "a training in its middle", PATIENCE)
    slurm.kill_node()
    killed = Killed({k: v for k, v in steps_of(project.root).items() if v < 60})
    driver.kill()
    seconds = {"until killed": time.monotonic() - start}
    assert slurm.ask("squeue", "-h", "--me"), "the array runs on without the driver"
    start = time.monotonic()
    driver.start()
    slurm.start_node()
    adopted = "is Slurm's task"
    wait_for(lambda: adopted in driver.said.read_text(), "the queued tasks to be found", PATIENCE)
    driver.answer()
    check(driver, killed, seconds | {"from then on": time.monotonic() - start})


@needs_ray
def test_ray(ray_cluster: RayCluster, address: str, tmp_path: Path) -> None:
    first = begin_project(tmp_path / "first", PARAMS)
    remote = str(tmp_path / "remote.git")
    first.run("git", "init", "-q", "--bare", remote)
    first.run("git", "remote", "add", "origin", remote)
    first.dvc("remote", "modify", "store", "url", str(tmp_path / "store"))
    first.run("git", "commit", "-q", "-a", "-m", "remotes")
    first.run("git", "push", "-q", "origin", "HEAD")
    first.dvc("push", "data.dvc")
    first.dvc("repro", "profile_memory")
    (first.root / ".venv-ray").symlink_to(REPOSITORY / ".venv-ray")
    clones = [tmp_path / "clone0", tmp_path / "clone1"]
    server = {"MLFLOW_TRACKING_URI": address}
    for number, clone in enumerate(clones):
        subprocess.run(["git", "clone", "-q", remote, str(clone)], check=True)
        ray_cluster.start(clone)
        wait_for(lambda n=number: ray_cluster.has_joined(n), f"node {number}", PATIENCE)
    driver = Driver(first, f"ray:{ray_cluster.address}", server)
    start = time.monotonic()
    driver.start()
    wait_for(lambda: driver.has_ended(2), "two trials", PATIENCE)
    wait_for(lambda: sent_of(clones[1]), "a training in its middle", PATIENCE)
    ray_cluster.kill(1)
    sent = sent_of(clones[1])
    running = {key: step for key, step in steps_of(clones[1]).items() if key in sent}
    killed = Killed(running, max(running[key] - sent[key] for key in running))
    driver.kill()
    seconds = {"until killed": time.monotonic() - start}
    start = time.monotonic()
    driver.start()
    driver.answer()
    check(driver, killed, seconds | {"from then on": time.monotonic() - start})
    assert ray_cluster.nodes[0].poll() is None, "the cluster is left as it is"
