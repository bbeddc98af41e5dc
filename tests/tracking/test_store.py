"""Where runs are recorded, and that several processes and moved checkouts agree on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from runkey.errors import TrackingError
from runkey.tracking.store import Store, experiment_id, locate_store, open_client

REPOSITORY = Path(__file__).parents[2]


def test_default_store_is_beside_the_main_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(REPOSITORY)  # DVC runs queued stages in a temporary folder
    store = locate_store()
    assert store.database == tmp_path / "mlflow.db"
    assert store.artifacts == tmp_path / "mlartifacts"


def test_relative_sqlite_address_does_not_follow_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/team.db")
    assert locate_store(tmp_path).database == tmp_path / "runs" / "team.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/absolute.db")
    assert locate_store(Path("/")).database == tmp_path / "absolute.db"


def test_a_server_decides_about_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    store = locate_store(tmp_path)
    assert store.is_server
    assert store.artifacts is None
    assert store.database is None


def test_experiment_has_an_absolute_location_from_any_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    client = open_client(store)
    number = experiment_id(client, store, "detection")
    assert experiment_id(client, store, "detection") == number
    experiment = client.get_experiment(number)
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    assert "mlruns" not in client.get_experiment_by_name("Default").artifact_location
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_processes_that_create_the_experiment_at_once_agree(store: Store) -> None:
    code = (
        "from pathlib import Path; import sys, time;"
        "from runkey.tracking.store import *;"
        "store = locate_store(Path(sys.argv[1])); client = open_client(store);"
        "client.search_experiments();"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()));"
        "print(experiment_id(client, store, 'race'))"
    )
    assert store.database is not None
    together = str(time.time() + 12)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store.database.parent), together],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [child.communicate(timeout=120)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert answers[0] == answers[1] != ""


def test_deleted_experiment_is_said_with_the_way_out(store: Store) -> None:
    client = open_client(store)
    client.delete_experiment(experiment_id(client, store, "detection"))
    with pytest.raises(TrackingError, match=r"'detection' was deleted; restore .*experiment"):
        experiment_id(client, store, "detection")


def test_missing_folder_of_the_database_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"nowhere: no such folder; set MLFLOW_TRACKING_URI"):
        open_client(Store(f"sqlite:///{tmp_path}/nowhere/mlflow.db", tmp_path, tmp_path))


def test_a_copied_checkout_keeps_its_artifacts_to_itself(store: Store, tmp_path: Path) -> None:
    client = open_client(store)
    run = client.create_run(experiment_id(client, store, "detection"))
    client.log_text(run.info.run_id, "weights", "model/weights.txt")
    foreign = client.create_experiment("foreign", artifact_location="file:///data/elsewhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / "mlflow.db", copy)
    shutil.copytree(tmp_path / "mlartifacts", copy / "mlartifacts")

    moved = open_client(locate_store(copy))
    home = (copy / "mlartifacts").as_uri()
    assert moved.get_experiment_by_name("detection").artifact_location == home
    assert moved.get_run(run.info.run_id).info.artifact_uri == f"{home}/{run.info.run_id}/artifacts"
    assert moved.get_experiment(foreign).artifact_location == "file:///data/elsewhere"
    original = (tmp_path / "mlartifacts").as_uri()
    assert client.get_experiment_by_name("detection").artifact_location == original


def test_telemetry_is_off_before_mlflow_is_there(store: Store) -> None:
    code = (
        "import os, sys; from pathlib import Path; import runkey.tracking.mlflow_run;"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'mlflow'], 'imported early';"
        "from runkey.tracking.store import locate_store, open_client;"
        "open_client(locate_store(Path(sys.argv[1])));"
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    )
    assert store.database is not None
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_DISABLE_TELEMETRY", "CI")}
    kept.pop("DO_NOT_TRACK", None)
    command = [sys.executable, "-c", code, str(store.database.parent)]
    out = subprocess.run(
        command, cwd=REPOSITORY, env=kept, capture_output=True, text=True, check=False
    )
    assert out.stdout.strip() == "True", out.stderr


OPEN = """
import sys
from pathlib import Path
from runkey.tracking.store import Store, open_client
root = Path(sys.argv[1])
store = Store(f"sqlite:///{root}/mlflow.db", root / "mlartifacts", root)
print(len(open_client(store).search_experiments()))
"""


@pytest.mark.slow
def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    # Some tables are there, the last ones are not.
    while not any(p.stat().st_size > 100_000 for p in tmp_path.glob(".runkey-*/mlflow.db")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize("place", ["folder", "address"])
def test_a_path_that_mlflow_would_cut_off_is_refused(tmp_path, monkeypatch, place):
    root = tmp_path / "what?" / "clone"
    if place == "address":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(
        TrackingError, match=r"what\?/clone/mlflow.db: MLflow takes the path .* `\?`"
    ):
        locate_store(root if place == "folder" else tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_odd_characters_in_the_path_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "a #%20;&'\"$`\\\n\u202f[{(*"
    root.mkdir()
    store = locate_store(root)
    client = open_client(store)
    experiment = client.get_experiment(experiment_id(client, store, "odd"))
    run = client.create_run(experiment.experiment_id).info.run_id
    client.log_text(run, "text", "file.txt")
    assert (root / "mlartifacts" / run / "artifacts/file.txt").read_text() == "text"
    assert sorted(path.name for path in root.iterdir()) == ["mlartifacts", "mlflow.db"]
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_the_database_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        open_client(Store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, tmp_path))
    finally:
        os.umask(before)
    assert (tmp_path / "mlflow.db").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_user_without_a_name_and_a_home():
    """As a container's with `--user 54321`."""
    code = "import sys; from pathlib import Path\n"
    code += "from runkey.tracking.store import locate_store, open_client\n"
    code += "open_client(locate_store(Path(sys.argv[1])))\n"
    without = {n: v for n, v in os.environ.items() if n not in ("HOME", "USER", "LOGNAME")}
    command = ["setpriv", "--reuid=54321", "--clear-groups", sys.executable]
    if subprocess.run([*command, "-c", ""], env=without, check=False).returncode:
        pytest.skip("another user cannot start this Python")
    target = Path(tempfile.mkdtemp())  # pytest's folders are root's alone
    target.chmod(0o777)
    try:
        done = subprocess.run(
            [*command, "-c", code, target], env=without, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert (target / "mlflow.db").is_file()
    finally:
        shutil.rmtree(target)
