"""A training that dies, and goes on in another clone from the checkpoint on the team's server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from runkey.hashing import sha256_file
from runkey.params import load_params
from runkey.params.render import render
from runkey.registry.checkpoints import Manifest, SharedFile, SharedFolder, newest_shared
from runkey.registry.library import ServerLibrary
from runkey.tracking.store import free_port, stop_server, wait_until_healthy
from runkey.training.checkpoint import read_file, write_file
from tests.support.kill_project import make_project
from tests.support.project import Project, clean_environment, in_one_line
from tests.support.team_servers import needs_packages, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STAGE = (sys.executable, "-m", "stages.train")
PATIENCE = "MLFLOW_HTTP_REQUEST_TIMEOUT"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of a loaded machine may answer late."""
    monkeypatch.setenv(PATIENCE, "300")


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


def at(address: str) -> dict[str, str]:
    """The environment of whoever uses a server."""
    return {"MLFLOW_TRACKING_URI": address, PATIENCE: "300"}


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
            env=clean_environment() | at(address),
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
    return [manifest for manifest, _ in newest_shared(library, key_of(project.root))]


@cache
def key_of(root: Path) -> str:
    printed = Project(root).run(sys.executable, "-m", "runkey", "key").stdout
    return printed.split()[0]


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.05)


def forge(address: str, project: Project, folder: Path) -> None:
    """Send another checkpoint of the newest's step, complete and hashed, that does not fit."""
    library = ServerLibrary(address, project.root / ".runkey")
    newest, place = newest_shared(library, key_of(project.root))[0]
    folder.mkdir()
    place.receive(newest, folder, dict.fromkeys((".ckpt", ".pt", ".jsonl"), 10**8))
    path = folder / newest.checkpoint
    facts, tensors, _ = read_file(path)
    tensors["parts"]["model"].popitem()
    write_file(path, facts, tensors)
    data = path.read_bytes()
    number = newest.number + 1
    sent = f"g{newest.generation}/{number:06d}-{path.name}"
    place.send(sent, [data], len(data))
    forged = SharedFile(sent, len(data), sha256_file(path))
    place.finish(replace(newest, number=number, files=newest.files | {path.name: forged}))


def test_another_clone_goes_on_from_the_shared_checkpoint(
    prepared: Project, undisturbed: dict[str, str], address: str, tmp_path: Path
) -> None:
    first, second = (clone(prepared, tmp_path / name) for name in ("first", "second"))
    with training(first, address) as process:
        until(process, lambda: any(m.step >= 6 for m in shared(address, first)))
        os.kill(process.pid, signal.SIGKILL)
    sent = shared(address, first)[0]
    forge(address, first, tmp_path / "forged")
    done = second.run(*STAGE, env=at(address))
    said = in_one_line(done.stdout + done.stderr)
    assert said.count(f"checkpoint of {sent.label} from the server:") == 1
    assert "other names than in this training; refused; not used" in said
    (resumed,) = map(int, re.findall(r"resuming after step (\d+) of 60", said))
    assert resumed >= sent.step > 0
    assert "not bit for bit" not in said
    assert results(second) == undisturbed
    assert shared(address, second) == []
    # What a process that was suspended sends after that is named, and goes.
    library = ServerLibrary(address, second.root / ".runkey")
    place = SharedFolder(library.client, library.matching(sent.key)[-1].run)
    place.send(f"g1/000001-{sent.checkpoint}", [b"late"], 4)
    place.tag(sent.label)
    clean = (sys.executable, "-m", "runkey", "gc", "--json")
    found = json.loads(second.run(*clean, env=at(address)).stdout)
    (late,) = [item for item in found["items"] if item["kind"] == "shared"]
    assert (late["bytes"], "of its key is finished" in late["why"]) == (4, True)
    second.run(*clean, "--apply", env=at(address))
    assert place.generations() == []


@needs_packages
def test_a_stopped_training_sends_its_last_checkpoint_to_s3(
    prepared: Project, undisturbed: dict[str, str], on_s3: str, tmp_path: Path
) -> None:
    first, second = (clone(prepared, tmp_path / name) for name in ("first", "second"))
    path = first.root / "params.yaml"
    rare = re.sub(r"share_checkpoint_minutes: .*", "share_checkpoint_minutes: 30", path.read_text())
    path.write_text(rare)
    with training(first, on_s3) as process:
        saved, library = first.root / ".runkey", ServerLibrary(on_s3, first.root / ".runkey")
        until(process, lambda: library.matching(key_of(first.root)))
        until(process, lambda: list(saved.glob("rk2-*/step-*.ckpt")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    (sent,) = shared(on_s3, first)
    said = (first.root / "output.txt").read_text()
    assert f"sending the checkpoint of step {sent.step} to the server" in said
    assert f"stopped by SIGTERM after step {sent.step} of 60" in said
    done = second.run(*STAGE, env=at(on_s3))
    assert f"resuming after step {sent.step} of 60" in done.stdout
    assert results(second) == undisturbed
    assert shared(on_s3, second) == []


@pytest.fixture
def on_s3(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server that keeps the artifacts in a bucket of a store that speaks S3."""
    port, bucket = free_port(), free_port()
    folder = tmp_path / "server"
    folder.mkdir()
    with s3_server(bucket) as store:
        urllib.request.urlopen(urllib.request.Request(f"{store}/runs", method="PUT")).close()
        secrets = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        region = {"AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_S3_ENDPOINT_URL": store}
        without_jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        process = subprocess.Popen(
            [*command, "--artifacts-destination", "s3://runs"],
            cwd=folder,
            env=clean_environment() | secrets | region | without_jobs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop_server(process)
