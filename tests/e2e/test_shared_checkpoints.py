"""A training that dies, and goes on in another clone from the checkpoint on the team's server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runkey.hashing import sha256_file
from runkey.params import load_params
from runkey.params.render import render
from runkey.registry.checkpoints import Manifest, newest_shared
from runkey.registry.library import ServerLibrary
from tests.support.kill_project import make_project
from tests.support.project import Project, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAGE = (sys.executable, "-m", "stages.train")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that a training of 60 steps can begin in."""
    project = make_project(tmp_path_factory.mktemp("prepared") / "repository", epochs=20)
    path = project.root / "params.yaml"
    params = load_params(path)
    changes = {"share_checkpoint_minutes": 1e-5, "system_metrics_seconds": 0.0}
    runtime = params.runtime.model_copy(update=changes)
    path.write_text(render(params.model_copy(update={"runtime": runtime}), "# shared"))
    return project


@pytest.fixture(scope="module")
def undisturbed(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what a training of a local store makes."""
    project = clone(prepared, tmp_path_factory.mktemp("undisturbed"))
    project.run(*STAGE)
    return results(project)


def clone(project: Project, folder: Path) -> Project:
    """Another machine's checkout, with nothing trained."""
    shutil.copytree(project.root, folder / "repository", symlinks=True)
    return Project(folder / "repository")


def results(project: Project) -> dict[str, str]:
    files = sorted((project.root / "model").iterdir())
    return {path.name: sha256_file(path) for path in files}


@contextmanager
def training(project: Project, address: str) -> Iterator[subprocess.Popen[str]]:
    with (project.root / "output.txt").open("w") as output:
        process = subprocess.Popen(
            STAGE,
            cwd=project.root,
            env=clean_environment() | {"MLFLOW_TRACKING_URI": address},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def shared(address: str, project: Project) -> list[Manifest]:
    """What the server has of the project's key, the latest step first."""
    library = ServerLibrary(address, project.root / ".runkey")
    return [manifest for manifest, _ in newest_shared(library, key_of(project))]


def key_of(project: Project) -> str:
    printed = project.run(sys.executable, "-m", "runkey", "key").stdout
    return printed.split()[0]


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.05)


def test_another_clone_goes_on_from_the_shared_checkpoint(
    prepared: Project, undisturbed: dict[str, str], address: str, tmp_path: Path
) -> None:
    first, second = (clone(prepared, tmp_path / name) for name in ("first", "second"))
    with training(first, address) as process:
        until(process, lambda: any(m.step >= 6 for m in shared(address, first)))
        os.kill(process.pid, signal.SIGKILL)
    sent = shared(address, first)[0]
    done = second.run(*STAGE, env={"MLFLOW_TRACKING_URI": address})
    (resumed,) = map(int, re.findall(r"resuming after step (\d+) of 60", done.stdout))
    assert resumed >= sent.step > 0
    assert "not bit for bit" not in done.stdout
    assert results(second) == undisturbed
    assert shared(address, second) == []
