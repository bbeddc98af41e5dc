"""Files of a run: all of them, right, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.record import Record
from runkey.registry.dvc_cache import download, in_the_way
from runkey.registry.library import LocalLibrary
from tests.support.records import FILES, key_of, make_run


@pytest.fixture
def record(root: Path) -> Record:
    return make_run(root, key_of("a"))


def files_of(record: Record) -> dict[str, object]:
    assert record.details
    return dict(record.details.files)


def all_files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_all_files_come_as_they_are(root: Path, record: Record, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    library = LocalLibrary(root / ".runkey")
    assert in_the_way(record, FILES, target) == []
    download(library, record, FILES, target)
    assert all_files(target) == FILES
    assert in_the_way(record, FILES, target) == []
    (target / "run.json").write_text("mine")
    (target / "model/weights.pt").unlink()
    (target / "model/weights.pt").symlink_to("nowhere")
    assert in_the_way(record, sorted(FILES), target) == ["model/weights.pt", "run.json"]
    download(library, record, FILES, target)
    assert all_files(target) == FILES


@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_one_wrong_file_and_nothing_comes(
    root: Path, record: Record, tmp_path: Path, fault: str
) -> None:
    library, target = LocalLibrary(root / ".runkey"), tmp_path / "target"
    weights = library.path_of(record, "model/weights.pt")
    match fault:
        case "flipped":
            weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "gone":
            weights.unlink()
    target.mkdir()
    (target / "run.json").write_text("mine")
    with pytest.raises(RegistryError) as caught:
        download(library, record, FILES, target)
    assert "model/weights.pt" in str(caught.value)
    assert record.run.run_id in str(caught.value)
    assert all_files(target) == {"run.json": b"mine"}
    assert [path.name for path in target.iterdir()] == ["run.json"]


def test_files_that_the_run_does_not_have(root: Path, record: Record, tmp_path: Path) -> None:
    library = LocalLibrary(root / ".runkey")
    with pytest.raises(RegistryError, match=r"model/x: run .* records no such file"):
        download(library, record, ["model/x"], tmp_path)
    with pytest.raises(RegistryError, match="records no such file"):
        download(library, replace(record, details=None), ["run.json"], tmp_path)


def test_paths_that_lead_out_are_refused(root: Path, record: Record, tmp_path: Path) -> None:
    assert record.details
    file = record.details.files["run.json"]
    for path in ("../out", "/tmp/out", "a/../../out"):
        evil = replace(record, details=replace(record.details, files={path: file}))
        with pytest.raises(RegistryError, match="no path inside a run"):
            download(LocalLibrary(root / ".runkey"), evil, [path], tmp_path / "target")
    assert not (tmp_path / "target").exists()
