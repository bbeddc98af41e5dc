"""`runkey.load`: every kind of reference gives the model, and a wrong one a line with a way out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import runkey
from runkey.errors import RunkeyError
from runkey.hashing import sha256_file
from runkey.identity.record import Record
from runkey.pipeline.find_model import find_model
from tests.support.records import key_of, make_run
from tests.support.small_model import photograph


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an empty local store, in which the current folder is."""
    root = tmp_path / "checkout"
    (root / "stages").mkdir(parents=True)
    (root / "params.yaml").write_text("")
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def files(small_model_folder: Path) -> dict[str, bytes]:
    """What a run records of its model."""
    files = {f"model/{path.name}": path.read_bytes() for path in small_model_folder.iterdir()}
    half = {"score": 0.125, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    thresholds = {
        "iou": 0.5,
        "weights": hashlib.sha256(files["model/weights.safetensors"]).hexdigest(),
        "classes": {"ball": half, "cube & more": None},
    }
    files["evaluation/thresholds.json"] = json.dumps(thresholds).encode()
    files["evaluation/predictions.json"] = b"[]"
    files["model/key.json"] = json.dumps({"key": key_of("a")}).encode()
    return files


@pytest.fixture
def record(checkout: Path, files: dict[str, bytes]) -> Record:
    return make_run(checkout, key_of("a"), files=files)


@pytest.mark.parametrize("length", [8, 12, 68])
@pytest.mark.parametrize("prefixed", [True, False])
def test_a_key_or_the_beginning_of_one(record: Record, length: int, prefixed: bool) -> None:
    model = runkey.load(record.key[:length].removeprefix("" if prefixed else "rk2-"))
    assert model.card.key == record.key
    assert [one.name for one in model.card.classes] == ["ball", "cube & more"]
    assert dict(model.card.thresholds) == {"ball": 0.125}


def test_a_run_s_files_are_copied_once_and_checked(
    record: Record, checkout: Path, files: dict[str, bytes]
) -> None:
    runkey.load(record.label)
    (copy,) = (checkout / ".runkey/models").iterdir()
    assert copy.name == hashlib.sha256(files["model/weights.safetensors"]).hexdigest()
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert names == set(files) - {"evaluation/predictions.json"}
    weights = copy / "model/weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")  # changed since
    time = (copy / "model/model.json").stat().st_mtime_ns
    runkey.load(record.label)
    assert weights.read_bytes() == content
    assert (copy / "model/model.json").stat().st_mtime_ns == time
    (checkout / "mlartifacts" / record.run.run_id / "artifacts/model/weights.safetensors").unlink()
    runkey.load(record.label)  # the copy is enough
    weights.unlink()
    with pytest.raises(RunkeyError, match=r"weights\.safetensors: No such file"):
        runkey.load(record.label)


def test_outside_a_repository(
    record: Record, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(RunkeyError, match="or set MLFLOW_TRACKING_URI to a server's address or"):
        runkey.load(record.label)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{checkout}/mlflow.db")
    assert runkey.load(record.label).card.key == record.key
    assert not list(elsewhere.iterdir())
    assert (checkout / ".runkey/models").is_dir()


def test_an_mlflow_run_and_one_of_a_key_s_runs(record: Record, checkout: Path) -> None:
    assert runkey.load(f"{record.label}:{record.run.run_id[:6]}").card.key == record.key
    with pytest.raises(RunkeyError, match=r"mlflow\.db: not found; `make repro` records"):
        runkey.load(f"runs:/{record.run.run_id}")


def test_folders(record: Record, files: dict[str, bytes], tmp_path: Path) -> None:
    for path, content in files.items():
        (tmp_path / "got" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / path).write_bytes(content)
    found = runkey.load(tmp_path / "got" / "model", device="cpu")(photograph(1), score=0)
    assert len(found) == 24
    again = runkey.load(str(tmp_path / "got"), device="cpu")(photograph(1), score=0)
    assert np.array_equal(again.scores, found.scores)
    assert np.array_equal(again.boxes_xyxy, found.boxes_xyxy)


def test_the_workspace_s_own_model_needs_no_store(checkout: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_bytes(content)
    assert runkey.load(key_of("a")[:12]).card.thresholds == {"ball": 0.125}
    assert not (checkout / ".runkey").exists()
    # Thresholds of other weights do not count.
    path = checkout / "evaluation/thresholds.json"
    digest = sha256_file(checkout / "model/weights.safetensors")
    path.write_text(path.read_text().replace(digest, "0" * 64))
    assert runkey.load(key_of("a")[:12]).card.thresholds == {}


def test_a_beginning_that_another_key_has_too_is_refused(
    record: Record, checkout: Path, files: dict[str, bytes]
) -> None:
    for path, content in files.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_bytes(content)
    begin = record.key[:8]
    assert find_model(begin) == checkout / "model"
    make_run(checkout, f"{begin}{'0' * 60}", files=files)
    with pytest.raises(RunkeyError, match=f"{begin}: 2 keys begin so"):
        find_model(begin)
    assert find_model(record.label) == checkout / "model"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("photo", "photo: no such file or folder, and no key; give a run's key"),
        ("rk2-abcd1234", "rk2-abcd1234: no run of that key in "),
        ("models:/detection", "models:/detection: not a model; write models:/NAME@ALIAS"),
        ("models:/detection@best", "models:/detection@best: no model of a run in sqlite:"),
        ("runs:/0123/weights", "runs:/0123/weights: write runs:/0123; its model is in model/"),
        ("stages", "stages: holds neither a model (model.json) nor an export (card.json);"),
    ],
)
def test_a_wrong_reference_is_one_line_with_a_way_out(
    checkout: Path, reference: str, message: str, empty_database: Path
) -> None:
    (checkout / "mlflow.db").write_bytes(empty_database.read_bytes())
    with pytest.raises(RunkeyError) as caught:
        runkey.load(reference)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_model(checkout: Path) -> None:
    failed = make_run(checkout, key_of("b"), status="FAILED", with_details=False)
    with pytest.raises(RunkeyError, match="is FAILED and recorded no model; `runkey list --where"):
        runkey.load(failed.label)


def test_what_import_runkey_gives() -> None:
    found = {runkey.load, runkey.Model, runkey.Detections}
    assert all(one.__doc__ for one in found)
    with pytest.raises(AttributeError, match="module 'runkey' has no attribute 'lode'"):
        runkey.lode  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "reference",
    [
        *("models:/a/99999999999999999999999", "models:/a/" + "9" * 5000, "models:/a/\u0661"),
        *(
            "models:/../x@y",
            "models:/" + "x" * 5000 + "@y",
            "models:/\udcff@x",
            "models:/a@\x1b[2J",
        ),
        *("runs:/", "runs:/../../etc", "runs:/\udcff", "runs:/%00", "", "\x00", "x" * 5000, "rk2-"),
    ],
)
def test_an_odd_reference_is_one_line(record: Record, reference: str) -> None:
    assert find_model(record.key).is_dir()
    with pytest.raises(RunkeyError) as caught:
        find_model(reference)
    assert "\n" not in str(caught.value).replace(reference, "")
