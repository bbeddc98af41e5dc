"""A team's server with MLflow's own login: its runs are reused, and its password stays unseen."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runkey.hashing import sha256_bytes
from runkey.identity.key import make_recipe
from runkey.identity.record import ARTIFACTS, CONTENT, DETAILS, Details, StoredFile
from runkey.registry.rest import RestClient
from runkey.tracking.store import Store, free_port, stop_server, wait_until_healthy
from runkey.tracking.transfer import StoreRuns
from tests.support.project import TINY, clean_environment, commit_recipe
from tests.support.run_package import weights
from tests.support.team_servers import needs_packages, with_packages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    needs_packages,
]
WORD = "geheim-lang@/%1"
ENCODED = "geheim-lang%40%2F%251"
NAMED = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": WORD}


@contextlib.contextmanager
def server(folder: Path, permission: str) -> Iterator[str]:
    """`host:port` of a real server that asks for a login; the permission is everybody's."""
    port = free_port()
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = {permission}\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = admin\nadmin_password = {WORD.replace('%', '%%')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", str(port)]
    own = {"MLFLOW_AUTH_CONFIG_PATH": f"{folder}/auth.ini", "MLFLOW_FLASK_SERVER_SECRET_KEY": "x"}
    own |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with contextlib.chdir(folder), (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--workers", "1"], env=with_packages(dict(os.environ) | own), text=True,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process)
        yield f"127.0.0.1:{port}"
    finally:
        stop_server(process)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("guarded"), "READ") as address:
        yield address


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, host: str) -> Path:
    """A repository whose team has the server, and a run of its key there."""
    root = tmp_path_factory.mktemp("login") / "repository"
    runtime = TINY["runtime"] | {"team_server": f"http://{host}"}
    commit_recipe(root, TINY | {"runtime": runtime})
    recipe, run = make_recipe("train", root), root.parent / "run"
    files = {
        "model/weights.safetensors": weights(),
        "model/key.json": json.dumps(recipe.as_dict()).encode(),
        "run.json": json.dumps({"key": recipe.key, "parts": recipe.parts}).encode(),
        "metrics/train.json": b"{}",
    }
    for path, content in files.items():
        (run / ARTIFACTS / path).parent.mkdir(parents=True, exist_ok=True)
        (run / ARTIFACTS / path).write_bytes(content)
    details = Details(
        stage="train",
        files={p: StoredFile(sha256=sha256_bytes(c), size=len(c)) for p, c in files.items()},
        outputs=sorted(files),
        witness={},
        host="there",
        snapshot=None,
        pointer_md5=None,
        decision="no run of this key: trained",
    )
    (run / ARTIFACTS / DETAILS).write_text(details.as_json())
    named = {"params": {"key": recipe.key}, "tags": {"key": recipe.key}, "metrics": {}}
    times = {"started_ms": 1_700_000_000_000, "ended_ms": 1_700_000_060_000, "datasets": []}
    content = {"schema": "run1", "run_id": "a" * 32, "name": "a", "status": "FINISHED"}
    (run / CONTENT).write_text(json.dumps(content | named | times))
    # The login of an address works for MLflow and for runkey's own client.
    server = Store(f"http://admin:{ENCODED}@{host}", None, root.parent / "home")
    assert StoreRuns(server, "team").write(run).key == recipe.key
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(template), str(copy)], check=True)
    return copy


def start(root: Path, *command: str, **env: str) -> tuple[int, str]:
    home = {"HOME": str(root.parent / "home"), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        env=clean_environment() | home | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stdout
    return done.returncode, " ".join(done.stdout.split())


def assert_unseen(said: str, root: Path) -> None:
    """The password is in nothing that was printed or written."""
    tracked = {root / name for name in ("tests", ".git", "docs", "benchmarks")}
    files = [p for p in root.rglob("*") if p.is_file() and tracked.isdisjoint(p.parents)]
    assert (root / "mlflow.db") in files
    for content in (said.encode(), *(path.read_bytes() for path in files)):
        assert b"geheim" not in content


@pytest.mark.parametrize("way", ["variables", "file"])
def test_a_run_of_the_team_is_reused(root: Path, host: str, way: str) -> None:
    env = NAMED if way == "variables" else {}
    if way == "file":
        file = root.parent / "home" / ".mlflow" / "credentials"
        file.parent.mkdir(parents=True)
        names = ("mlflow_tracking_username = admin", f"mlflow_tracking_password = {WORD}")
        file.write_text("\n".join(["[mlflow]", *names]).replace("%", "%%"))
    code, said = start(root, "stages.train", **env)
    assert code == 0, said
    assert f"(http://{host}) is reused" in said
    assert (root / "model/weights.safetensors").read_bytes() == weights()
    assert_unseen(said, root)


def test_an_address_with_a_login_is_used_and_not_shown(root: Path, host: str) -> None:
    address = {"MLFLOW_TRACKING_URI": f"http://admin:{ENCODED}@{host}/"}
    code, said = start(root, "stages.train", **address)
    assert (code, (root / "model/weights.safetensors").read_bytes()) == (0, weights())
    for command in (["list"], ["list", "--json"], ["ui"], ["verify", "--all"], ["show", "rk2-"]):
        said += start(root, "runkey", *command, **address)[1]
    key = make_recipe("train", root).key
    for command in (["show", key], ["open", key], ["show", key, "--json"]):
        code, shown = start(root, "runkey", *command, **address)
        assert code == 0, shown
        said += shown
    assert f"http://{host}/#/experiments/" in said
    assert "geheim" not in said
    dead = {"MLFLOW_TRACKING_URI": f"http://admin:{ENCODED}@127.0.0.1:9/"}
    for command in (["list"], ["ui"], ["publish", key], ["gc"], ["replay", key]):
        code, shown = start(root, "runkey", *command, **dead)
        assert code == 1, shown
        assert "geheim" not in shown
        assert "http://127.0.0.1:9" in shown


@pytest.mark.parametrize("login", [{}, NAMED | {"MLFLOW_TRACKING_PASSWORD": "wrong"}])
def test_without_a_right_login_the_variables_are_named(
    root: Path, host: str, login: dict[str, str]
) -> None:
    names = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    own = {"MLFLOW_TRACKING_URI": f"http://{host}"} | login
    code, said = start(root, "stages.train", **own)  # before hours of training, not after
    assert code == 1, said
    assert f"error: http://{host}: no login, or a wrong one (HTTP 401); {names}" in said
    for command in (["list"], ["ui"], ["fetch", "rk2-0000"]):
        code, said = start(root, "runkey", *command, **own)
        assert (code, names in said) == (1, True), said


def other_key(root: Path) -> None:
    """Change a parameter: no run of this key is on the server."""
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("seed: 0", "seed: 7"))


def test_who_may_only_read_reuses_and_does_not_train(root: Path, host: str) -> None:
    admin = RestClient(f"http://admin:{ENCODED}@{host}")
    admin.check_writes("tiny")
    admin.post("users/create", {"username": "reader", "password": "a-long-password"})
    login = {"MLFLOW_TRACKING_USERNAME": "reader", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
    own = {"MLFLOW_TRACKING_URI": f"http://{host}"} | login
    assert "is reused" in start(root, "stages.train", **own)[1]
    other_key(root)
    code, said = start(root, "stages.train", **own)
    assert code == 1, said
    assert f"error: http://{host}: this login may not do that (HTTP 403, experiments/" in said
    assert "ask for permission EDIT, or set MLFLOW_TRACKING_USERNAME" in said
    assert said.count("error: ") == 1
    assert admin.model(make_recipe("train", root).key) is None  # no claim


def test_where_nobody_sees_what_others_recorded_nothing_is_trained(
    root: Path, tmp_path: Path
) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(re.sub(r"team_server: \S+", "team_server: none", text))
    (tmp_path / "closed").mkdir()
    with server(tmp_path / "closed", "NO_PERMISSIONS") as closed:
        admin = RestClient(f"http://admin:{ENCODED}@{closed}")
        admin.post("users/create", {"username": "berta", "password": "a-long-password"})
        login = {"MLFLOW_TRACKING_USERNAME": "berta", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
        own = {"MLFLOW_TRACKING_URI": f"http://{closed}"} | login
        code, said = start(root, "stages.train", **own)
        assert code == 1, said
        asked = "(HTTP 403, registered-models/get)"
        assert f"error: http://{closed}: this login may not do that {asked}" in said
        assert "ask for permission EDIT" in said
        assert said.count("error: ") == 1
        assert not (root / "model/weights.safetensors").exists()
        assert list(admin.models("rk2-")) == []  # no claim


def test_a_server_that_is_down_ends_it_before_training(root: Path) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    code, said = start(root, "stages.train", MLFLOW_TRACKING_URI=away)
    assert code == 1, said
    assert said.startswith(f"error: {away}: cannot be reached ([Errno 111] Connection refused)")
    assert "MLFLOW_TRACKING_URI or runtime.team_server names it; not trained without a" in said
