"""environment/team-server/: what compose.yaml and start.sh say, against MLflow and the page."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import environment_variables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "environment/team-server"
START = (FOLDER / "start.sh").read_text()
PAGE = (ROOT / "docs/team-server.md").read_text()
SECRETS = re.findall(r"for name in (.*); do", (FOLDER / "secrets.sh").read_text())[0].split()


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services of compose.yaml."""
    tree = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    used = {
        volume.partition(":")[0]
        for service in tree["services"].values()
        for volume in service.get("volumes", ())
        if not volume.startswith(".")
    }
    assert used == set(tree["volumes"])
    return dict(tree["services"])


def test_each_image_has_a_version(services: dict[str, Any]) -> None:
    images = [one["image"] for one in services.values() if "image" in one]
    assert len(images) == 2
    for image in images:
        name, _, version = image.partition(":")
        assert version not in ("", "latest")
        assert f"`{name.rpartition('/')[2]}`" in PAGE
    assert re.search(r"^FROM python:3\.12-", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)


def test_files_that_it_mounts_and_builds_from_are_there(services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", ()):
            if volume.startswith("."):
                assert (FOLDER / volume.partition(":")[0]).is_file()
    build = services["server"]["build"]
    context = (FOLDER / build["context"]).resolve()
    assert context == ROOT
    for line in (context / build["dockerfile"]).read_text().splitlines():
        if line.startswith("COPY "):
            assert (context / line.split()[1]).is_file()


def test_the_server_gets_the_variables_that_it_reads(services: dict[str, Any]) -> None:
    given = services["server"]["environment"].keys()
    read = set(re.findall(r"\$\{?([A-Z]\w+)", START)) - set(re.findall(r"\bexport (\w+)=", START))
    read -= {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_AUTH_CONFIG_PATH", "PORT", "CONFIG"}
    assert read <= given
    for name in given:
        assert name in START or name.startswith("AWS_") or name in read, name
        if name.startswith("MLFLOW_") and name != "MLFLOW_FLASK_SERVER_SECRET_KEY":
            assert hasattr(environment_variables, name), name
    wanted = re.findall(r"\$\{(\w+):\?", (FOLDER / "compose.yaml").read_text())
    assert set(wanted) == set(SECRETS)


def test_mlflow_accepts_its_command_line() -> None:
    command = START[START.index("exec python -m mlflow server") :].replace("\\\n", " ")
    words = shlex.split(command.replace('${HOSTS:+--allowed-hosts "$HOSTS"}', "--allowed-hosts h"))
    words = [{"$PORT": "5000", "$WORKERS": "2"}.get(word, word) for word in words[5:]]
    # In a process of its own: MLflow warns where it is imported.
    parse = "import json, sys; from mlflow.cli import server as s;"
    parse += " print(json.dumps(s.make_context('server', sys.argv[1:]).params))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", parse, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    params = json.loads(done.stdout.splitlines()[-1])
    assert (params["workers"], params["app_name"]) == ("2", "basic-auth")
    assert "--timeout-worker-healthcheck 120" in params["uvicorn_opts"]


def test_secrets_are_lines_of_shell_and_compose_alike() -> None:
    lines = subprocess.run(
        ["sh", "secrets.sh"], cwd=FOLDER, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.partition("=")[0] for line in lines] == SECRETS
    assert all(re.fullmatch(r"\w+=[0-9a-f]{32}", line) for line in lines)
    assert len({line.partition("=")[2] for line in lines}) == len(SECRETS)


def test_the_versions_are_the_locked_ones() -> None:
    def pins(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE))

    own, locked = pins(FOLDER / "requirements.txt"), pins(ROOT / "requirements.txt")
    shared = own.keys() & locked.keys()
    assert {name: own[name] for name in shared} == {name: locked[name] for name in shared}
    assert {"mlflow", "sqlalchemy", "boto3"} <= shared
