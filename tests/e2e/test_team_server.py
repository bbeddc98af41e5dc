"""docs/team-server.md, command by command: PostgreSQL, S3, a login, two workers, a shared run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.registry.library import ServerLibrary
from runkey.registry.share import _is_published
from runkey.tracking.store import free_port
from tests.support.project import REPOSITORY, TINY, begin_project, clean_environment
from tests.support.team_servers import (
    Postgres,
    needs_packages,
    needs_postgres,
    postgres,
    s3_server,
)

__all__ = ["postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), needs_packages, needs_postgres]
PAGE = REPOSITORY / "docs/team-server.md"


def blocks() -> list[str]:
    """The shell commands of the page."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@dataclass
class Host:
    """Where the page's commands run."""

    root: Path
    env: dict[str, str]

    def shell(self, commands: str, code: int = 0) -> str:
        """Run commands as a newcomer types them, which end with a code; what they print."""
        log = self.root.parent / "commands.log"
        with log.open("w") as file:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", commands],
                cwd=self.root,
                env=self.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
                check=False,
            )
        said = " ".join(log.read_text().split())
        assert done.returncode == code, said[-4000:]
        return said


@contextmanager
def ended(folder: Path) -> Iterator[None]:
    """End the processes that name a folder, when the block ends."""
    try:
        yield
    finally:
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"CONFIG={folder}\0" in entry.read_text(errors="replace"):
                    os.kill(int(entry.parent.name), signal.SIGKILL)
            except OSError:  # it ended meanwhile
                continue


def test_a_run_is_shared_by_the_commands_of_the_page(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin_project(tmp_path / "anna", TINY)
    shutil.copytree(first.root, tmp_path / "colleague", symlinks=True)
    team, home, port, s3 = tmp_path / "team", tmp_path / "home", free_port(), free_port()
    home.mkdir()
    env = clean_environment() | {
        "HOME": str(home),
        "TEAM": str(team),
        "PORT": str(port),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": "runkey",
        "ARTIFACTS": "s3://runs",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", f"{Path.home()}/.cache/uv"),
    }
    packages, server, user, use = blocks()
    for name in packages.split()[3:]:
        assert shutil.which({"postgresql": "psql"}.get(name, name)), name
    host, other = Host(first.root, env), Host(tmp_path / "colleague", env)
    address = f"http://127.0.0.1:{port}"
    client = f"export MLFLOW_TRACKING_URI={address}\n"
    with ended(team):
        with s3_server(s3):
            began = time.monotonic()
            said = host.shell("\n".join([server, user, use]))
            sys.stdout.write(f"from nothing to a shared run: {time.monotonic() - began:.0f} s\n")
            assert "no run of this key: trained here" in said
            key = first.json("run.json")["key"]
            began = time.monotonic()
            said = other.shell(f"{client}dvc repro")
            sys.stdout.write(f"the colleague's `dvc repro`: {time.monotonic() - began:.0f} s\n")
            assert "is reused" in said
            for path in ("run.json", "model/weights.safetensors"):
                assert (first.root / path).read_bytes() == (other.root / path).read_bytes()
            collated = postgres.ask("SELECT count(*) FROM pg_database WHERE datcollate = 'C'")
            assert int(collated) >= 2
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "anna-has-a-secret")
            library = ServerLibrary(address, tmp_path)
            (record,) = library.matching(key)
            assert not _is_published(record, library)  # S3 says that there is no such file
        # S3 is down, and what it has is not known: nothing is trained again.
        for ask in (lambda: _is_published(record, library), lambda: library.with_details(record)):
            with pytest.raises(RegistryError) as caught:
                ask()
            assert address in str(caught.value)
            assert "is the store behind it up? It keeps mlflow-artifacts:/" in str(caught.value)
        weights = other.root / "model/weights.safetensors"
        weights.unlink()
        said = other.shell(f"{client}python -m stages.train", code=1)
        assert "is the store behind it up?" in said
        assert "not trained without a claim (runtime.require_claim: false does so)" in said
        assert not weights.exists()
