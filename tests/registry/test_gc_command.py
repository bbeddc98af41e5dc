"""`runkey gc` as it is typed: what it lists, what it says, its exit code."""

import json

import pytest
from typer.testing import CliRunner

from runkey.cli import app
from runkey.errors import TrackingError
from runkey.registry.library import LocalLibrary
from tests.support.collectable import KEY
from tests.support.records import key_of, make_run


@pytest.fixture
def here(house, monkeypatch):
    monkeypatch.chdir(house.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return house


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["gc", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_lists_and_deletes_nothing_by_itself(here):
    make_run(here.root, KEY, "a" * 32)
    here.folder(KEY, 2_500_000)
    said = run()
    assert f"{KEY[:16]}/" in said
    assert "1 may go, 2.5 MB; --apply deletes them" in said
    assert (here.home / KEY).exists()
    told = json.loads(run("--apply", "--json"))
    assert told["items"][0]["deleted"] is True
    assert told["bytes"] >= 2_500_000
    assert not (here.home / KEY).exists()
    assert run() == "nothing to delete\n"


def test_what_cannot_be_deleted_is_said_and_the_rest_goes(here, monkeypatch):
    make_run(here.root, KEY, "b" * 32, status="FAILED")
    make_run(here.root, key_of("two"), "c" * 32)
    here.folder(key_of("two"))

    def refuse(store, run_id):
        raise TrackingError(f"run {run_id}: the database is locked")

    monkeypatch.setattr("runkey.tracking.transfer.delete_run", refuse)
    result = CliRunner().invoke(app, ["gc", "--apply"])
    assert result.exit_code == 1
    assert "the database is locked" in " ".join(result.output.split())
    assert "1 of 2 could not be deleted" in str(result.exception)
    assert LocalLibrary(here.home).matching(KEY)
    assert not (here.home / key_of("two")).exists()
