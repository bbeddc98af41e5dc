"""`runkey promote` as it is typed, and `runkey delete`, which leaves a promoted run alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest

import runkey
from runkey.errors import RunkeyError
from runkey.identity.record import Record
from runkey.registry.models import check_not_promoted, registered_run
from runkey.tracking.logged_model import ModelDescription, log_model
from runkey.tracking.store import Store, experiment_id, open_client
from tests.support.records import key_of, make_run, write_record
from tests.support.small_model import photograph


@pytest.fixture
def evaluated(
    store: Store, small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Record]:
    """Makes a run of a real MLflow store, in whose checkout the current folder is."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "params.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    client = open_client(store)
    files = {path.name: path for path in small_model_folder.iterdir()}
    stored = {f"model/{name}": path.read_bytes() for name, path in files.items()}
    photograph(1).save(tmp_path / "a.png")

    def make(name: str, *, is_logged: bool = True, experiment: str = "detection") -> Record:
        key, experiment = key_of(name), experiment_id(client, store, experiment)
        run_id = client.create_run(experiment, tags={"key": key}).info.run_id
        client.log_param(run_id, "key", key)
        record = make_run(tmp_path, key, run_id, files=stored)
        write_record(
            store.cache, replace(record, run=replace(record.run, experiment_id=experiment))
        )
        if is_logged:
            described = ModelDescription(f"detector-{name}", key, "", {})
            log_model(store, run_id, described, files, tmp_path / "a.png")
        return record

    return make


def test_promote_moves_the_alias_and_every_loader_follows(evaluated, run, store, monkeypatch):
    first, second = evaluated("a"), evaluated("b")
    code, out, err = run("promote", first.label)
    assert (code, err) == (0, "")
    assert out == f"{first.label}: detection version 1 is models:/detection@production\n"
    assert runkey.load("models:/detection@production").card.sizes.short_side == 48
    _, out, _ = run("promote", second.label, "--alias", "production")
    assert out.splitlines()[1] == f"before: version 1, {first.label}"
    _, out, _ = run("promote", second.label, "--alias", "best", "--name", "cells", "--json")
    answer = json.loads(out)
    assert (answer["address"], answer["version"]) == ("models:/cells@best", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    loaded = mlflow.pyfunc.load_model("models:/detection@production")
    frame = pd.DataFrame([[Path("a.png").read_bytes()]], columns=pd.Index(["image"], dtype=object))
    assert len(loaded.predict(frame, params={"score": 0.0})) == 24

    with pytest.raises(RunkeyError, match=r"is promoted as cells@best, detection@production; pro"):
        check_not_promoted(store.full_uri, [first, second])
    check_not_promoted(store.full_uri, [first])
    _, out, _ = run("promote", second.label, "--remove", "--alias", "best", "--name", "cells")
    assert out == f"{second.label}: cells version 1 is no longer models:/cells@best\n"


def test_what_cannot_be_promoted_is_one_line(evaluated, run):
    record = evaluated("a", is_logged=False)
    code, _, err = run("promote", record.label)
    assert code == 1
    assert "as it was not evaluated there; run `dvc repro -f evaluate`" in " ".join(err.split())
    for words in (["--alias", "a b"], ["--name", record.key], ["--name", "x/y"]):
        code, _, err = run("promote", record.label, *words)
        assert code == 1
        assert "letters, digits, `_`, `-` and `.` only, and no key" in " ".join(err.split())
    code, _, err = run("promote", record.label, "--remove")
    assert code == 1
    assert "detection@production names no model; nothing is removed" in " ".join(err.split())


KILLED = """
import os, signal, sys
from mlflow import MlflowClient

name, when, *words = sys.argv[1:]
original = getattr(MlflowClient, name)

def killing(*arguments, **options):
    if when == "after":
        original(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(MlflowClient, name, killing)
from runkey.cli import main
sys.argv[1:] = words
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_promote_that_was_killed_is_done_again_and_doubles_nothing(evaluated, run, store, when):
    record, client = evaluated("a"), open_client(store)
    for name in ("create_registered_model", "create_model_version", "set_registered_model_alias"):
        command = [sys.executable, "-c", KILLED, name, when, "promote", record.label]
        path = {"PYTHONPATH": str(Path(runkey.__file__).parents[1])}
        done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    code, out, err = run("promote", record.label)
    assert (code, err) == (0, "")
    assert out == f"{record.label}: detection version 1 is models:/detection@production\n"
    assert len(client.search_registered_models()) == 1
    (version,) = client.search_model_versions("name = 'detection'")
    assert version.run_id == record.run.run_id


def test_a_quote_in_the_experiments_name_is_promoted_too(evaluated, run, store):
    record = evaluated("a", experiment='Anna\'s "cells"')
    for _ in range(2):
        code, out, err = run("promote", record.label, "--json")
        assert (code, err) == (0, "")
        answer = json.loads(out)
        assert (answer["name"], answer["version"]) == ('Anna\'s "cells"', "1")
    assert registered_run(store.full_uri, answer["address"]) == record.run.run_id
