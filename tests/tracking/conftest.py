"""A real sqlite store, made once (MLflow takes seconds for the tables) and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runkey.tracking import Store, locate_store
from runkey.tracking.mlflow_tracker import Pace
from runkey.tracking.store import open_client

FAST = Pace(flush_points=50, flush_seconds=0.2, retry_seconds=0.3, close_seconds=60)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    open_client(Store(uri, root / "mlartifacts", root)).search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return locate_store(tmp_path)


@pytest.fixture
def said() -> list[str]:
    return []
