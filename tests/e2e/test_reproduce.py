"""A real run reproduced: real git, DVC, MLflow and training, in its own clone and in another."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from runkey.registry.library import LocalLibrary
from tests.support.project import Project, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def record(project: Project, run_id: str) -> dict[str, object]:
    """The record of a run of the project's store."""
    records = LocalLibrary(project.root / ".runkey").matching("rk2-")
    return next(r.as_dict() for r in records if r.run.run_id == run_id)


def entries(project: Project) -> set[str]:
    """DVC's run-cache."""
    runs = project.root / ".dvc" / "cache" / "runs"
    return {path.name for path in runs.rglob("*") if path.is_file()}


def test_another_clone_reproduces_the_run_bit_for_bit(project: Project, tmp_path: Path) -> None:
    manifest = project.json("run.json")
    key, run_id = manifest["key"], manifest["run_id"]
    subprocess.run(["git", "clone", "-q", str(project.root), str(tmp_path / "clone")], check=True)
    clone = Project(tmp_path / "clone")
    clone.run("git", "fetch", "-q", "origin", "refs/runkey/*:refs/runkey/*")
    # A clone has no data of its own here; a team would have a remote.
    clone.run(sys.executable, "-m", "dvc", "cache", "dir", "--local", f"{project.root}/.dvc/cache")
    before = entries(project)
    done = clone.run(
        *(sys.executable, "-m", "runkey", "reproduce", key, "--json"),
        env={"MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db"},
    )
    told = json.loads(done.stdout)
    assert told["identical"] is True
    assert told["same_class"] is True
    assert told["reproduced"] is True
    assert told["run_id"] != run_id
    assert {"eval/AP", "eval/AR_100", "eval/loss"} < set(told["metrics"])
    assert {n: pair for n, pair in told["metrics"].items() if pair[0] != pair[1]} == {}
    # It was trained, not restored; and DVC goes on giving the first run.
    assert f"trained again to compare with run {run_id[:8]}" in done.stderr
    assert entries(project) == before
    repeat = record(project, told["run_id"])
    assert repeat["run"]["tags"]["reproduction_of"] == run_id  # type: ignore[index]
    first = record(project, run_id)
    (outcome,) = first["details"]["outcomes"]  # type: ignore[index]
    assert outcome["run_id"] == told["run_id"]
    assert "bit-identical" in first["run"]["tags"]["reproduced"]  # type: ignore[index]
    assert len(clone.run("git", "worktree", "list").stdout.splitlines()) == 1
    assert list((project.root / ".runkey" / "reproduce").iterdir()) == []
    project.run(sys.executable, "-m", "runkey", "verify", "--all")


def test_an_interrupted_one_leaves_nothing_running(project: Project) -> None:
    key = project.json("run.json")["key"]
    before = entries(project)
    process = subprocess.Popen(
        [sys.executable, "-m", "runkey", "reproduce", key],
        cwd=project.root,
        env=clean_environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if "Running stage" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "interrupted; " in " ".join(rest.split()), said + rest  # long lines are folded
    assert list((project.root / ".runkey" / "reproduce").iterdir()) == []
    assert len(project.run("git", "worktree", "list").stdout.splitlines()) == 1
    assert entries(project) == before
    assert not _running_in(project.root / ".runkey" / "reproduce")


def test_a_lock_that_is_not_installed_stops_it(project: Project) -> None:
    """The snapshot of the run is of one key only: another environment is another key."""
    run = record(project, project.json("run.json")["run_id"])
    oid = str(run["details"]["snapshot"])  # type: ignore[index]
    project.run("git", "worktree", "add", "-q", "--detach", "other", oid)
    other = Project(project.root / "other")
    pins = (other.root / "requirements.txt").read_text()
    (other.root / "requirements.txt").write_text(pins.replace("numpy==", "numpy==9", 1))
    other.run("git", "commit", "-q", "-a", "-m", "other pins")
    new = other.run("git", "rev-parse", "HEAD").stdout.strip()
    path = project.root / ".runkey" / "runs.sqlite"
    whole = path.read_bytes()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE runs SET details = replace(details, ?, ?)", (oid, new))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "runkey", "reproduce", str(run["run"]["params"]["key"])],  # type: ignore[index]
            cwd=project.root,
            env=clean_environment(),
            capture_output=True,
            text=True,
        )
    finally:
        path.write_bytes(whole)
        project.run("git", "worktree", "remove", "--force", "other")
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert "not as requirements.txt of then locks them: 1 package: numpy: locked 9" in line
    assert "--any-environment goes on" in line
    left = Path(line.rpartition(" left in ")[2].removesuffix(", where the same command goes on"))
    assert left.is_dir()
    project.run("git", "worktree", "remove", "--force", str(left))


def _running_in(folder: Path) -> list[int]:
    """Processes whose current folder lies there, or lay there before it was deleted."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(folder) in str((process / "cwd").readlink()):
                found.append(int(process.name))
        except OSError:
            continue
    return found
