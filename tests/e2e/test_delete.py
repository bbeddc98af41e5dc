"""`runkey delete` with real DVC and MLflow: what is deleted is trained again, not restored."""

from __future__ import annotations

import sys

import pytest

from tests.support.project import Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def runkey(project: Project, *words: str) -> str:
    return project.run(sys.executable, "-m", "runkey", *words).stdout


def test_a_deleted_key_is_trained_again(project: Project) -> None:
    baseline = project.json("run.json")["key"]
    project.dvc("exp", "run", "-n", "going", "-S", "lr=5e-5")
    key = project.json("run.json")["key"]
    assert key != baseline
    listed = runkey(project, "delete", key[:12])
    assert "going" in listed
    assert "--apply deletes them" in listed
    assert "going" in project.dvc("exp", "list")
    assert "the working tree still holds this result" in runkey(project, "delete", key, "--apply")
    assert "going" not in project.dvc("exp", "list")
    assert key[:16] not in runkey(project, "list")
    assert runkey(project, "gc") == "nothing to delete\n"
    assert "no faults" in runkey(project, "verify", "--all")
    project.run("git", "checkout", "-q", "params.yaml")
    assert "is cached" in project.dvc("repro"), "the other run is restored"
    assert project.json("run.json")["key"] == baseline
    again = project.dvc("exp", "run", "-n", "again", "-S", "lr=5e-5")
    assert f"key {key[:16]}: no run of this key: trained here" in again
    runkey(project, "delete", key, "--apply")
    assert "no run of this key: trained here" in project.dvc("repro", "--force", "train")
