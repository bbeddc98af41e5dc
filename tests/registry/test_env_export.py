"""`runkey env export`: the lock of a run, from the snapshot of its code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.key import make_recipe, short_key
from runkey.registry.environment import export_environment
from runkey.registry.snapshot import take_snapshot
from tests.support.records import make_run

REPOSITORY = Path(__file__).parents[2]
FILES = ("conda-lock.yml", "requirements.txt", "params.yaml", "dvc.yaml", "data.dvc")


@pytest.fixture
def repository(tmp_path):
    """A clone in small: the real lists and code, one commit."""
    root = tmp_path / "repository"
    for folder in ("runkey", "stages"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=ignored)
    for name in FILES:
        shutil.copy(REPOSITORY / name, root)
    (root / ".gitignore").write_text("__pycache__/\n/.runkey/\n/mlartifacts/\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", *identity, *command], cwd=root, check=True)
    return root


@pytest.fixture
def run(repository):
    """A recorded run whose snapshot holds another lock than the one checked out since."""
    lock = repository / "conda-lock.yml"
    then = lock.read_text()
    lock.write_text(then.replace("- name: numpy\n  version: 2", "- name: numpy\n  version: 3", 1))
    recipe = make_recipe("train", repository)
    snapshot = take_snapshot(repository, repository, recipe)
    parts = {f"key.{part}": digest for part, digest in recipe.parts.items()}
    record = make_run(
        repository,
        recipe.key,
        snapshot=snapshot,
        params={"lr": "0.0001", "key": recipe.key, **parts},
    )
    record_lock = lock.read_bytes()
    lock.write_text(then)
    return record, record_lock


def test_the_lock_of_then_comes_back_and_not_that_of_now(repository, run, tmp_path):
    record, lock = run
    files = export_environment(repository, record, tmp_path / "env")
    assert [path.name for path in files] == ["conda-lock.yml", "requirements.txt"]
    assert files[0].read_bytes() == lock != (repository / "conda-lock.yml").read_bytes()
    assert files[1].read_bytes() == (repository / "requirements.txt").read_bytes()
    assert export_environment(repository, record, tmp_path / "env") == files


def test_the_command_writes_and_says_what_to_run(repository, run, tmp_path):
    record, lock = run
    clean = {k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "MLFLOW_TRACKING_URI")}
    command = [sys.executable, "-m", "runkey", "env", "export", record.key[4:14]]
    done = subprocess.run(command, cwd=repository, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = f"{short_key(record.key)}-environment"
    assert (repository / folder / "conda-lock.yml").read_bytes() == lock
    assert f"conda-lock install --name {record.label} {folder}/conda-lock.yml" in done.stdout
    told = subprocess.run(
        [*command, "--to", str(tmp_path / "x"), "--json"],
        cwd=repository, env=clean, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert json.loads(told)["files"][0] == str(tmp_path / "x/conda-lock.yml")


def test_files_that_are_there_with_other_content_are_kept(repository, run, tmp_path):
    (tmp_path / "conda-lock.yml").write_text("mine")
    with pytest.raises(RegistryError, match=r"conda-lock\.yml: is there, with other content"):
        export_environment(repository, run[0], tmp_path)
    assert (tmp_path / "conda-lock.yml").read_text() == "mine"
    assert not (tmp_path / "requirements.txt").exists()


def test_a_snapshot_whose_lock_is_not_the_keys_is_refused(repository, run, tmp_path):
    record, _ = run
    other = make_run(repository, record.key, "b" * 32, snapshot=record.details.snapshot)
    with pytest.raises(RegistryError, match="the lock in its snapshot is not that of its key"):
        export_environment(repository, other, tmp_path / "env")
    assert not (tmp_path / "env").exists()


def test_a_run_without_snapshot_and_one_whose_snapshot_is_elsewhere(repository, tmp_path):
    key = f"rk2-{'0' * 64}"
    for snapshot, text in (
        (None, "rk2-000000000000: the run kept no snapshot of its code"),
        ("1" * 40, "rk2-000000000000: its snapshot 111111111111 is not in this repository; "),
    ):
        record = make_run(repository, key, snapshot=snapshot)
        with pytest.raises(RegistryError) as caught:
            export_environment(repository, record, tmp_path / "env")
        assert str(caught.value).startswith(text)


def test_a_folder_that_is_there_keeps_its_mode(repository, run, tmp_path):
    target = tmp_path / "shared"
    target.mkdir()
    target.chmod(0o2775)
    export_environment(repository, run[0], target)
    assert target.stat().st_mode & 0o7777 == 0o2775
