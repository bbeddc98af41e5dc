"""docs/using-the-model.md: the Python that it shows runs as it stands, on a promoted run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runkey.tracking.logged_model import ModelDescription, log_model, promote
from runkey.tracking.store import Store, experiment_id, open_client
from tests.support.records import make_run, write_record
from tests.support.small_model import photograph

PAGE = (Path(__file__).parents[2] / "docs/using-the-model.md").read_text(encoding="utf-8")
KEY = re.findall(r'runkey\.load\("(rk2-\w+)"\)', PAGE)[0].ljust(len("rk2-") + 64, "0")


def blocks(section: str) -> list[str]:
    """The Python of a section, in order."""
    text = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (found,) = [part for part in text if part.startswith(f"{section}\n")]
    return re.findall(r"^```python\n(.*?)^```", found, re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(
    store: Store, small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A checkout with photo.jpg and a promoted run of that key."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "params.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    photograph(1).save("photo.jpg")
    client = open_client(store)
    files = {path.name: path for path in small_model_folder.iterdir()}
    experiment = experiment_id(client, store, "detection")
    run_id = client.create_run(experiment, tags={"key": KEY}).info.run_id
    client.log_param(run_id, "key", KEY)
    contents = {f"model/{name}": path.read_bytes() for name, path in files.items()}
    made = make_run(tmp_path, KEY, run_id, files=contents)
    record = replace(made, run=replace(made.run, experiment_id=experiment))
    write_record(store.cache, record)
    described = ModelDescription("detector", KEY, "", {})
    log_model(store, run_id, described, files, tmp_path / "photo.jpg")
    promote(store, record, "production")
    return tmp_path


def test_python(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    first, second = blocks("Python")
    exec(first, names)
    assert (checkout / "drawn.png").stat().st_size > 100
    exec(second, names)
    assert len(names["every"]) == 24
    assert len(names["few"]) == 2
    assert len(re.findall(r"photo\.jpg \d+", capsys.readouterr().out)) == 3


def test_mlflow(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    (block,) = blocks("MLflow")
    try:
        exec(block, names)
        assert list(names["rows"].columns) == ["image", "class", "score", "x1", "y1", "x2", "y2"]
    finally:
        names["mlflow"].set_tracking_uri("")
