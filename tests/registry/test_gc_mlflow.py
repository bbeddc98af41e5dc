"""Runs of a real MLflow store are put into its trash."""

import shutil

import pytest
from typer.testing import CliRunner

from runkey.cli import app
from runkey.tracking.store import Store, experiment_id, locate_store, open_client
from runkey.tracking.transfer import delete_run
from tests.support.records import key_of, make_run


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    root = tmp_path_factory.mktemp("template")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    open_client(Store(uri, root / "mlartifacts", root)).search_experiments()
    return root / "mlflow.db"


@pytest.mark.slow
def test_a_failed_run_is_deleted_from_mlflow_too(repository, database, monkeypatch):
    monkeypatch.chdir(repository.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, repository.root / "mlflow.db")
    store = locate_store(repository.root)
    client = open_client(store)
    experiment = experiment_id(client, store, "tests")
    ids = [client.create_run(experiment).info.run_id for _ in range(2)]
    make_run(repository.root, key_of("one"), ids[0], status="FAILED")
    make_run(repository.root, key_of("one"), ids[1])
    make_run(repository.root, key_of("two"), "f" * 32, status="KILLED")  # MLflow does not know it

    result = CliRunner().invoke(app, ["gc", "--apply"])

    assert result.exit_code == 0, result.output
    assert "deleted 2" in result.output
    stages = [client.get_run(run_id).info.lifecycle_stage for run_id in ids]
    assert stages == ["deleted", "active"]
    assert (repository.root / "mlartifacts" / ids[1]).is_dir()
    assert not (repository.root / "mlartifacts" / ids[0]).exists()
    delete_run(store, ids[0])  # again
