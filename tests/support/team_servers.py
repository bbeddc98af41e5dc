"""Servers that a team may have: with TLS, on PostgreSQL, with MLflow's login, S3."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runkey.tracking.store import free_port
from tests.support.project import REPOSITORY

SITE = next(REPOSITORY.glob(".venv-test-servers/lib/python3*/site-packages"), None)
"""Flask-WTF and a driver for PostgreSQL."""
needs_packages = pytest.mark.skipif(SITE is None, reason="`make env-test-servers` installs them")
BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
needs_postgres = pytest.mark.skipif(
    BINARIES is None, reason="PostgreSQL is not installed; on Debian: apt-get install postgresql"
)


def with_packages(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which a server finds the packages of `SITE`."""
    there = environment.get("PYTHONPATH", "")
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), there]))}


class Postgres:
    """A database server of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"postgresql://runkey@127.0.0.1:{self.port}/postgres"
        # It refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", "data", "-A", "trust", "-U", "runkey", "--no-sync")
        settings = (
            f"port = {self.port}",
            "listen_addresses = '127.0.0.1'",
            f"unix_socket_directories = '{folder}'",
        )
        with (folder / "data/postgresql.conf").open("a") as file:
            file.writelines(f"{line}\n" for line in settings)

    def start(self) -> None:
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "start")

    def end(self) -> None:
        """As when its machine goes down: no transaction is finished."""
        self._run("pg_ctl", "-D", "data", "-m", "immediate", "stop")

    def ask(self, statement: str) -> str:
        return self._run(*self._psql, "-At", "-c", statement)

    @contextmanager
    def locked(self, table: str) -> Iterator[None]:
        """Let whoever writes to a table wait, in the middle of its transaction."""
        assert BINARIES
        psql = subprocess.Popen(
            [str(BINARIES / self._psql[0]), *self._psql[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert psql.stdin
        assert psql.stdout
        psql.stdin.write(f"BEGIN;\nLOCK TABLE {table};\n\\echo locked\n")
        psql.stdin.flush()
        while "locked" not in (line := psql.stdout.readline()):
            assert line
        yield
        psql.kill()
        psql.communicate()

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a lock."""
        found = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return int(self.ask(found)) > 0

    @property
    def _psql(self) -> list[str]:
        return ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "runkey", "postgres"]

    def _run(self, name: str, *arguments: str) -> str:
        assert BINARIES
        # A file: pg_ctl's server keeps the streams of pg_ctl.
        with tempfile.TemporaryFile("w+") as file:
            code = subprocess.run(
                [str(BINARIES / name), *arguments],
                cwd=self.folder,
                user=self._user,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
            file.seek(0)
            text = file.read()
        assert code == 0, text
        return text


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    # Not in pytest's folder, into which other users cannot look.
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        running = Postgres(Path(name))
        running.start()
        yield running
        running.end()


@contextmanager
def s3_server(port: int) -> Iterator[str]:
    """A store that speaks S3, moto's; it forgets everything when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--port", str(port)],
        env=with_packages(dict(os.environ)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that nobody else has signed, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=runkey"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, capture_output=True, check=True)
    return certificate, key
