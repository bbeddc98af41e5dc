"""Two machines in effect: own caches, own MLflow stores; one git remote, DVC remote and server."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runkey.params import parse_params
from runkey.params.render import render
from runkey.tracking.server import free_port, start_server, stop_server, wait_until_healthy
from runkey.tracking.store import Store
from tests.pipeline.conftest import TINY, Project, _copy, _draw_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass
class Team:
    """What the clones share, and the first of them, which trained and published."""

    folder: Path
    address: str
    first: Project
    key: str
    published: str

    def clone(self, name: str) -> Project:
        """Another machine, with the raw data and nothing else."""
        copied = Project(self.folder / name)
        command = ["git", "clone", "-q", str(self.folder / "remote.git"), str(copied.root)]
        subprocess.run(command, check=True)
        copied.dvc("pull", "data.dvc")
        return copied


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, which keeps the artifacts itself."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    with contextlib.chdir(folder):
        process = start_server(Store(f"sqlite:///{folder / 'mlflow.db'}", None, folder), port)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_server(process)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, address: str) -> Team:
    folder = tmp_path_factory.mktemp("team")
    first = Project(folder / "first")
    _copy(first.root)
    shutil.rmtree(first.root / "data", ignore_errors=True)
    _draw_data(first.root / "data")
    runtime = TINY["runtime"] | {"team_server": address}
    params = parse_params(TINY | {"runtime": runtime})
    (first.root / "params.yaml").write_text(render(params, "# tiny"))
    first.run("git", "init", "-q")
    first.run("git", "init", "-q", "--bare", str(folder / "remote.git"))
    first.run("git", "remote", "add", "origin", str(folder / "remote.git"))
    first.dvc("remote", "modify", "store", "url", str(folder / "store"))
    first.dvc("add", "data")
    first.run("git", "add", "-A")
    first.run("git", "commit", "-q", "-m", "start")
    first.run("git", "push", "-q", "origin", "HEAD")
    first.dvc("push", "data.dvc")
    first.dvc("repro")
    key = first.json("run.json")["key"]
    return Team(folder, address, first, key, runkey(first, "publish", key[:12]))


def runkey(project: Project, *arguments: str) -> str:
    return project.run(sys.executable, "-m", "runkey", *arguments).stdout


def timed_repro(project: Project) -> str:
    """`dvc repro`; what it printed, its seconds told to whoever reads the test's output."""
    start = time.monotonic()
    printed = project.dvc("repro")
    sys.stdout.write(f"dvc repro in {project.root.name}: {time.monotonic() - start:.1f} s\n")
    return printed


def same_results(one: Project, other: Project) -> None:
    for path in ("run.json", "metrics/train.json", "model/weights.pt", "model/key.json"):
        assert (one.root / path).read_bytes() == (other.root / path).read_bytes(), path


def test_publish_says_what_it_sent_and_sends_it_once(team: Team) -> None:
    assert "published\n" in team.published
    assert re.search(r"DVC +\d\d objects \(\d+\.\d MB\), 4 stages; \d\d sent to ", team.published)
    again = runkey(team.first, "publish", team.key)
    assert "published already" in again
    assert "all were there" in again
    listed = subprocess.run(
        ["git", "ls-remote", str(team.folder / "remote.git"), f"refs/runkey/{team.key}/*"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert len(listed) == 1


def test_a_fetched_key_is_restored_and_no_stage_runs(team: Team) -> None:
    second = team.clone("second")
    start = time.monotonic()
    fetched = runkey(second, "fetch", team.key[:12], "--json")
    sys.stdout.write(f"runkey fetch: {time.monotonic() - start:.1f} s\n")
    assert json.loads(fetched)["state"] == "new"
    printed = timed_repro(second)
    assert "Running stage" not in printed
    assert printed.count("is cached - skipping run") == 4
    same_results(team.first, second)
    same = ("metrics/evaluate.json", "evaluation/metrics.json")
    assert all(second.json(path) == team.first.json(path) for path in same)
    (record,) = json.loads(runkey(second, "list", "--json", "--limit", "5"))
    assert team.key in json.dumps(record)
    # Handed on from here it is still the first one's run.
    assert "published already" in runkey(second, "publish", team.key)
    assert json.loads(runkey(second, "fetch", team.key, "--json"))["state"] == "already there"


def test_without_fetch_train_takes_the_result_from_the_server(team: Team) -> None:
    third = team.clone("third")
    printed = timed_repro(third)
    assert "trained in" not in printed
    same_results(team.first, third)


def test_an_archive_does_the_same_without_a_server(team: Team, tmp_path: Path) -> None:
    archive = tmp_path / "run.zip"
    runkey(team.first, "export", team.key, str(archive))
    fourth = team.clone("fourth")
    start = time.monotonic()
    taken = json.loads(runkey(fourth, "import", str(archive), "--json"))
    sys.stdout.write(f"runkey import: {time.monotonic() - start:.1f} s\n")
    assert taken["is_new"]
    assert "Running stage" not in timed_repro(fourth)
    same_results(team.first, fourth)
