"""A checkout with one recorded run, all of it real but the training: git, DVC, MLflow's database.

It takes seconds to make, so it is made once and copied for each test.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections import OrderedDict
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking._tracking_service import utils

from runkey.hashing import sha256_file
from runkey.identity.code import RULE, hash_files
from runkey.identity.key import Recipe
from runkey.identity.record import DETAILS, Details, Record, RunEnvironment, RunManifest, StoredFile
from runkey.identity.record_cache import update_record
from runkey.registry.dvc_cache import md5_file
from runkey.registry.library import LocalLibrary, open_library, run_reader
from runkey.registry.verify import Report, Sources, verify_run
from runkey.tracking.store import experiment_id, locate_store, open_client
from runkey.tracking.transfer import logged_run
from tests.support.once import made_once
from tests.support.records import write_record

PIPELINE = """
stages:
  prepare:
    cmd: python make.py prepared/images.bin
    deps: [make.py]
    outs: [prepared]
  train:
    cmd: python make.py model/weights.pt model/key.json run.json metrics/train.json
    deps: [make.py, prepared/images.bin]
    outs: [model, run.json]
    metrics:
      - metrics/train.json: {cache: false}
  evaluate:
    cmd: python make.py evaluation/metrics.json
    deps: [make.py, model, run.json]
    outs: [evaluation]
"""
MAKE = """import pathlib, shutil, sys
for path in map(pathlib.Path, sys.argv[1:]):
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile("given" / path, path)
"""
OUTPUTS = ("model/weights.pt", "model/key.json", "run.json", "metrics/train.json")
FILES = (*OUTPUTS, "evaluation/metrics.json", "params.yaml")


@dataclass
class Checkout:
    """The copy of one test."""

    root: Path

    @property
    def records(self) -> Path:
        return self.root / ".runkey" / "runs.sqlite"

    @property
    def record(self) -> Record:
        (record,) = LocalLibrary(self.records.parent).matching("rk2-")
        return record

    @property
    def details(self) -> Details:
        assert self.record.details
        return self.record.details

    @property
    def artifacts(self) -> Path:
        return self.root / "mlartifacts" / self.record.run.run_id / "artifacts"

    def change_details(self, **changes: Any) -> None:
        """Write the record otherwise, in both places."""
        details, artifacts = replace(self.details, **changes), self.artifacts
        write_record(self.records, replace(self.record, details=details))
        (artifacts / DETAILS).write_text(details.as_json())

    def verify(self, *, quick: bool = False, is_shared: bool = False) -> Report:
        store = locate_store(self.root)
        sources = Sources(
            library=open_library(store.uri, store.home),
            stored=run_reader(store.uri),
            root=self.root,
            is_shared=is_shared,
            quick=quick,
        )
        return verify_run(self.record, sources)

    def git(self, *arguments: str) -> str:
        return run(self.root, "git", *arguments)


def run(root: Path, *command: str) -> str:
    names = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "Tester"), ("EMAIL", "tester@example.org"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_", "MLFLOW_"))}
    done = subprocess.run(
        command,
        cwd=root,
        env=env | names | {"PATH": path, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "recorded-checkout", _make)


def _make(root: Path) -> None:
    (root / "stages").mkdir(parents=True)
    (root / "stages" / "__init__.py").write_text('"""Stages."""\n')
    (root / "stages" / "train.py").write_text("print('training')\n")
    (root / "params.yaml").write_text("lr: 0.001\nseed: 0\n")
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "make.py").write_text(MAKE)
    (root / ".gitignore").write_text("/.runkey\n/mlflow.db\n/mlartifacts\n/given\n")
    run(root, "git", "init", "-q")
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-q", "-m", "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        _record_run(root)


def _record_run(root: Path) -> None:
    code = hash_files(["stages/__init__.py", "stages/train.py"], root)
    recipe = Recipe(
        "train",
        {"train": "python -m stages.train"},
        {
            "code": {"rule": RULE, "files": code, "excluded": []},
            "params": {"lr": 0.001, "seed": 0},
            "data": {"data": "md5:0123.dir"},
            "environment": {"platform": "linux-64", "packages": [["numpy", "2.0", "b", "h"]]},
        },
    )
    oid = run(root, "git", "rev-parse", "HEAD")
    run(root, "git", "update-ref", f"refs/runkey/{recipe.key}/{oid[:12]}", oid)
    store = locate_store(root)
    client = open_client(store)
    number = experiment_id(client, store, "tests")
    started = client.create_run(number, run_name="baseline", tags={"key": recipe.key})
    run_id = started.info.run_id
    _write_outputs(root / "given", recipe, run_id)
    run(root, "dvc", "init", "-q")
    run(root, "dvc", "repro", "-q")
    files = {path: _stored(root / path) for path in FILES}
    for name, value in {"key": recipe.key, "lr": "0.001"}.items():
        client.log_param(run_id, name, value)
    for part, digest in recipe.parts.items():
        client.log_param(run_id, f"key.{part}", digest)
    client.log_metric(run_id, "eval/AP", 0.5)
    client.log_metric(run_id, "train/loss", float("nan"))
    witness = asdict(_witness())
    del witness["packages"], witness["files"]
    details = Details(
        stage="train",
        files=files,
        outputs=sorted(OUTPUTS),
        witness=witness,
        host=socket.gethostname(),
        snapshot=oid,
        pointer_md5=md5_file(root / "run.json"),
        decision="no run of this key: trained here",
        evaluations={"rk2-e": {"eval/AP": 0.5}},
    )
    for path in FILES:
        folder = str(Path(path).parent)
        client.log_artifact(run_id, str(root / path), None if folder == "." else folder)
    (root / DETAILS).write_text(details.as_json())
    client.log_artifact(run_id, str(root / DETAILS))
    (root / DETAILS).unlink()
    client.set_terminated(run_id)
    record = Record(run=logged_run(client.get_run(run_id)), details=details)
    write_record(root / ".runkey" / "runs.sqlite", record)


def _write_outputs(given: Path, recipe: Recipe, run_id: str) -> None:
    for folder in ("prepared", "model", "metrics", "evaluation"):
        (given / folder).mkdir(parents=True)
    (given / "prepared" / "images.bin").write_bytes(bytes(range(256)))
    (given / "model" / "weights.pt").write_bytes(bytes(range(200)))
    (given / "model" / "key.json").write_text(json.dumps(recipe.as_dict()))
    (given / "metrics" / "train.json").write_text('{"seconds": 1.0}\n')
    (given / "evaluation" / "metrics.json").write_text('{"AP": 0.5}\n')
    manifest = RunManifest(
        key=recipe.key, stage="train", parts=recipe.parts, run_id=run_id, witness=_witness()
    )
    manifest.write(given / "run.json")


def _witness() -> RunEnvironment:
    return RunEnvironment(
        device="cpu x86_64",
        micro_batch=8,
        world_size=1,
        threads=1,
        interpreter="CPython 3.12.1 Linux x86_64",
        packages={"numpy": "2.0"},
        package_differences=[],
        files=["stages/train.py"],
        undeclared_files=[],
        commit=None,
        dirty=False,
    )


def _stored(path: Path) -> StoredFile:
    return StoredFile(sha256=sha256_file(path), size=path.stat().st_size)


@pytest.fixture
def checkout(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    root = tmp_path / "checkout"
    shutil.copytree(made, root, symlinks=True)
    monkeypatch.chdir(root)
    copy = Checkout(root)
    # Else what is missing in the copy would be found in the original.
    uri = copy.record.run.artifact_uri.replace(made.as_uri(), root.as_uri())
    update_record(copy.records, replace(copy.record.run, artifact_uri=uri))
    monkeypatch.setattr(utils, "_artifact_repos_cache", OrderedDict())  # of the same run's id
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
            change = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
            database.execute(change, (made.as_uri(), root.as_uri()))
    return copy
