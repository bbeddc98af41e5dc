"""`runkey trial` with real git, DVC and training: twice, killed, and refused before it trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from runkey.errors import RunkeyError
from runkey.registry.snapshot import git
from runkey.sweep.trial import key_of
from runkey.tracking.store import free_port
from tests.support.project import TINY, Project, clean_environment, commit_recipe

TRIAL = (sys.executable, "-m", "runkey", "trial", "HEAD", "--json")


def trial(project: Project, *changes: str) -> tuple[dict[str, Any], str]:
    done = project.run(*TRIAL, *(part for one in changes for part in ("-S", one)))
    return json.loads(done.stdout), done.stderr


def runs_of(project: Project, key: str) -> list[dict[str, Any]]:
    listed = project.run(sys.executable, "-m", "runkey", "list", "--json", "--limit", "100")
    return [one for one in json.loads(listed.stdout) if one["key"] == key]


def weights_of(project: Project, key: str) -> str:
    (run,) = runs_of(project, key)
    return run["details"]["files"]["model/weights.safetensors"]["sha256"]


def refused(root: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        [*TRIAL, *arguments],
        cwd=root,
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    return done.returncode, line


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_trial_started_twice_trains_once(project: Project) -> None:
    before = project.run("git", "status", "--porcelain").stdout
    first, printed = trial(project, "lr=1e-4")
    assert "Running stage 'train'" in printed
    again, printed = trial(project, "lr=0.0001")
    assert again == first
    assert "Running stage" not in printed
    (run,) = runs_of(project, first["key"])
    assert run["run"]["status"] == "FINISHED"
    assert run["run"]["params"]["lr"] == "0.0001"
    assert project.run("git", "status", "--porcelain").stdout == before
    assert "trials" not in project.run("git", "worktree", "list").stdout
    assert list((project.root / ".runkey/trials").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_trial_goes_on_with_the_same_bits(project: Project, tmp_path: Path) -> None:
    other = Project(tmp_path / "other")
    shutil.copytree(project.root, other.root, symlinks=True)
    changes = ("seed=5", "training.epochs=8", "runtime.checkpoint_seconds=0")
    home = project.root / ".runkey"
    known = set(home.glob("rk2-*"))
    options = [part for one in changes for part in ("-S", one)]
    started = subprocess.Popen(
        [*TRIAL, *options],
        cwd=project.root,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not any(
        "epoch_loss" in log.read_text()
        for folder in set(home.glob("rk2-*")) - known
        for log in folder.glob("train.jsonl")
    ):
        assert started.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    parent = psutil.Process(started.pid)
    for process in [*parent.children(recursive=True), parent]:
        process.kill()
    started.wait()
    assert [path.name for path in home.glob("trials/*/*")]
    done, printed = trial(project, *changes)
    assert "goes on in" in printed
    (run,) = runs_of(project, done["key"])
    assert run["run"]["tags"]["resumed"] == "1"
    whole, _ = trial(other, *changes)
    assert whole["key"] == done["key"]
    assert weights_of(project, done["key"]) == weights_of(other, done["key"])


def test_it_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    commit_recipe(tmp_path, TINY)
    code, line = refused(tmp_path, "-S", "learning_rate=1")
    assert code == 1
    assert "unknown key learning_rate" in line
    server = f"http://127.0.0.1:{free_port()}"
    code, line = refused(tmp_path, MLFLOW_TRACKING_URI=server)
    assert code == 75
    assert server in line
    assert not (tmp_path / ".runkey/trials").exists()


def test_a_commit_of_another_version_makes_its_key_by_its_own_code(tmp_path: Path) -> None:
    commit_recipe(tmp_path, TINY)
    first = git(tmp_path, "rev-parse", "HEAD")
    schema = tmp_path / "runkey/params/schema.py"
    schema.write_text(schema.read_text() + "\n# another version\n")
    who = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
    git(tmp_path, *who, "commit", "-q", "-a", "-m", "comment")
    second = git(tmp_path, "rev-parse", "HEAD")
    keys = [key_of(tmp_path, oid, {"seed": 3, "data.long_side": 80})[0] for oid in (first, second)]
    assert keys[0] == keys[1]
    with pytest.raises(RunkeyError, match="unknown key sed; did you mean seed"):
        key_of(tmp_path, second, {"sed": 3})


def test_nohup_keeps_the_end_of_a_terminal_away() -> None:
    code = "import os, signal; from runkey.cli import sweep; sweep._end_by_signals();"
    code += " os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    plain = [sys.executable, "-c", code]
    # The tests themselves may run under nohup.
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for command in (["env", "--default-signal=HUP", *plain], ["nohup", *plain])
    ]
    assert outputs == ["", "goes on\n"]
