"""A team of real clones: own caches, own MLflow stores; one git remote, DVC remote and server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runkey.tracking.server import free_port, start_server, stop_server, wait_until_healthy
from runkey.tracking.store import Store
from tests.support.project import TINY, Project, begin_project


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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory, address: str) -> Team:
    folder = tmp_path_factory.mktemp("team")
    runtime = TINY["runtime"] | {"team_server": address}
    first = begin_project(folder / "first", TINY | {"runtime": runtime})
    first.run("git", "init", "-q", "--bare", str(folder / "remote.git"))
    first.run("git", "remote", "add", "origin", str(folder / "remote.git"))
    first.dvc("remote", "modify", "store", "url", str(folder / "store"))
    first.run("git", "commit", "-q", "-a", "-m", "remotes")
    first.run("git", "push", "-q", "origin", "HEAD")
    first.dvc("push", "data.dvc")
    first.dvc("repro")
    key = first.json("run.json")["key"]
    return Team(folder, address, first, key, runkey(first, "publish", key[:12]))


def runkey(project: Project, *arguments: str) -> str:
    return project.run(sys.executable, "-m", "runkey", *arguments).stdout
