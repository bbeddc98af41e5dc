"""A real MLflow server behind TLS, with a certificate that only its team knows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runkey.registry.rest import RestClient
from runkey.tracking.store import (
    Store,
    free_port,
    open_client,
    start_server,
    stop_server,
    wait_until_healthy,
)
from tests.support.project import REPOSITORY, clean_environment
from tests.support.team_servers import self_signed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"))[0]


@pytest.fixture(scope="module")
def address(certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UVICORN_SSL_CERTFILE", str(certificate))
        patch.setenv("UVICORN_SSL_KEYFILE", str(certificate.with_name("key.pem")))
        patch.chdir(folder)
        process = start_server(
            Store(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts", folder), port
        )
        patch.setenv("SSL_CERT_FILE", str(certificate))  # for `wait_until_healthy`
        try:
            wait_until_healthy(f"https://127.0.0.1:{port}", process)
            yield f"https://127.0.0.1:{port}"
        finally:
            stop_server(process)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    for name in (*names, "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE"])
def test_its_certificate_is_named_by_a_variable(
    address: str, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, str(certificate))
    made = open_client(Store(address, None, tmp_path)).create_experiment(f"by {name}")
    assert RestClient(address).experiment(f"by {name}").experiment_id == made


def test_a_folder_of_certificates_is_one_too(
    address: str, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / certificate.name).write_bytes(certificate.read_bytes())
    subprocess.run(["openssl", "rehash", str(tmp_path)], check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
    assert [one.experiment_id for one in RestClient(address).experiments()]


@pytest.mark.parametrize("command", [["list"], ["show", "rk2-0000"], ["fetch", "rk2-0000"]])
def test_without_it_a_line_names_the_variable(
    address: str, tmp_path: Path, command: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runkey", *command],
        cwd=REPOSITORY,
        env=clean_environment() | {"MLFLOW_TRACKING_URI": address, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    said = " ".join(done.stderr.split())
    assert said.startswith(f"error: {address}: cannot be reached (self-signed certificate)"), said
    assert said.endswith("name its certificate in MLFLOW_TRACKING_SERVER_CERT_PATH")
