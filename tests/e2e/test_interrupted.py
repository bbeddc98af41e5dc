"""The train stage killed, started again, and left without MLflow: its run is one and whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runkey.identity.key import make_recipe, training_folder
from runkey.identity.record import RunPointer
from runkey.params import load_params
from runkey.tracking.store import locate_store, open_client
from tests.support.points import assert_the_same_points
from tests.support.project import Project, clean_environment, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Project:
    """The project with more epochs, so that there is time to interrupt it."""
    copied = Project(tmp_path / "copy")
    shutil.copytree(project.root, copied.root, ignore=shutil.ignore_patterns("mlartifacts", "tmp"))
    params = (copied.root / "params.yaml").read_text()
    params = params.replace("  epochs: 2\n", "  epochs: 120\n")
    params = params.replace("  evaluate_every: 1\n", "  evaluate_every: 20\n")
    (copied.root / "params.yaml").write_text(params)
    return copied


def key_of(project: Project) -> str:
    params = load_params(project.root / "params.yaml")
    return make_recipe("train", project.root, params).key


def runs_of(project: Project, key: str) -> list[Any]:
    client = open_client(locate_store(project.root))
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.key = '{key}'"))


def test_killed_and_started_again_it_is_one_run(copy: Project) -> None:
    key, store = key_of(copy), locate_store(copy.root)
    folder = training_folder(store.home, key)
    training = subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=copy.root,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not ((pointer := RunPointer.read(folder)) and pointer.sent.get("train.jsonl")):
        assert training.poll() is None, training.communicate()[0]
        time.sleep(0.05)
    training.kill()
    training.communicate()
    (run,) = runs_of(copy, key)
    assert run.info.status == "RUNNING"
    assert "DEAD" in copy.run(sys.executable, "-m", "runkey", "list").stdout
    assert "nothing to delete" in copy.run(sys.executable, "-m", "runkey", "gc").stdout

    done = copy.run(sys.executable, "-m", "stages.train")
    (again,) = runs_of(copy, key)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    assert_the_same_points(copy.root / "logs" / "train.jsonl", store, run.info.run_id)
    assert not folder.exists()
    assert "MLflow: " not in done.stdout
    shown = copy.run(sys.executable, "-m", "runkey", "show", key).stdout
    listed = copy.run(sys.executable, "-m", "runkey", "list").stdout
    if "resuming after step" in done.stdout:  # else it was killed before its first checkpoint
        assert "resumed      once, after step " in shown
        assert "(resumed 1x)" in listed
    assert "reused" in copy.run(sys.executable, "-m", "stages.train").stdout


def test_without_mlflow_it_ends_well_and_is_sent_later(copy: Project) -> None:
    key, store = key_of(copy), locate_store(copy.root)
    nobody = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    done = copy.run(sys.executable, "-m", "stages.train", env=nobody)
    folder = training_folder(store.home, key)
    way = f"MLflow: `runkey replay {key[:16]}` sends the rest from {folder}"
    assert way in in_one_line(done.stdout)
    assert list(folder.glob("*.ckpt")) == []
    log = (copy.root / "logs" / "train.jsonl").read_bytes()

    again = copy.run(sys.executable, "-m", "stages.train").stdout
    assert f"key {key[:16]}: trained before, while MLflow was away; sending it\n" in again
    assert "is reused" in again
    (run,) = runs_of(copy, key)
    assert_the_same_points(copy.root / "logs" / "train.jsonl", store, run.info.run_id)
    assert (copy.root / "logs" / "train.jsonl").read_bytes() == log
    assert not folder.exists()
    kept = copy.run(sys.executable, "-m", "runkey", "replay", key[:16])
    assert (
        kept.stdout == f"run {run.info.run_id}, FINISHED: nothing is kept here that it could lack\n"
    )
    verified = copy.run(sys.executable, "-m", "runkey", "verify", key, "--quick")
    assert "FAULT" not in verified.stdout
