"""A real sqlite store, made once (MLflow takes seconds for the tables) and copied for each test."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runkey.identity.record import Details, StoredFile
from runkey.tracking.describe import RunDescription
from runkey.tracking.mlflow_run import Pace, TrackedRun
from runkey.tracking.store import (
    Store,
    free_port,
    locate_store,
    open_client,
    start_server,
    stop_server,
    wait_until_healthy,
)
from runkey.tracking.sync import RunSender, TrainingRun
from tests.support.once import made_once

FAST = Pace(flush_seconds=0.2, retry_seconds=0.3, close_seconds=60)
DIGEST = "22a1a2931c8370d3aeedd7183606fd7f.dir"
RECORD = Details(
    stage="train",
    files={"model/weights.pt": StoredFile(sha256="0" * 64, size=3)},
    outputs=["model/weights.pt"],
    witness={"device": "cpu x86_64"},
    host="here",
    snapshot=None,
    pointer_md5=None,
    decision="no run of this key: trained here",
)


def description(**changes: object) -> RunDescription:
    fields: dict[str, object] = {
        "name": "lr=5e-05",
        "params": {f"p{i}": "v" for i in range(130)} | {"lr": "5e-05", "key": "rk2-0"},
        "tags": {"device": "cpu"},
        "dataset": {
            "name": "data",
            "digest": DIGEST,
            "source": '{"uri": "data"}',
            "profile": '{"images": 2}',
        },
    }
    return RunDescription(**(fields | changes))  # type: ignore[arg-type]


def start_run(store: Store, *dead: str, **options: Any) -> TrackedRun:
    """Record a run without a log; what it is given goes straight to MLflow."""
    training = TrainingRun("detection", description(), store.home / "key", supersedes=dead)
    return TrackedRun(None, RunSender(store, training, **options), pace=FAST)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(root: Path) -> None:
        uri = f"sqlite:///{root / 'mlflow.db'}"
        open_client(Store(uri, root / "mlartifacts", root)).search_experiments()

    return made_once(tmp_path_factory, "empty-database", make) / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return locate_store(tmp_path)


class Server:
    """`mlflow server` on a store."""

    def __init__(self, store: Store) -> None:
        self.store, self.port = store, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = start_server(self.store, self.port)
        wait_until_healthy(self.address, self.process)

    def kill(self) -> None:
        if self.process:
            stop_server(self.process, kill=True)
            self.process = None


@pytest.fixture
def server(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    running = Server(store)
    running.start()
    yield running
    running.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take all room there is."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):  # full
                while True:
                    file.write(b"x" * size)
    return path


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Return when the condition holds; a loaded machine takes its time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.05)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Messages that runkey logs during the test, as they come; from any thread."""
    logger, handler = logging.getLogger("runkey"), _Messages()
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)
