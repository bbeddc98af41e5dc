"""Long ways to the team and from it say how far they are."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from dvc.fs import LocalFileSystem, generic

from runkey import progress
from runkey.dvc_transfer import TransferProgress
from runkey.progress import Steps
from runkey.progress import progress as shown
from runkey.tracking import transfer as runs


def test_objects_are_counted_by_their_bytes_as_dvc_moves_them(tmp_path: Path) -> None:
    sizes = {"aa" + "0" * 30: 5 << 20, "bb" + "1" * 30: 0, "cc" + "2" * 30: 7}
    sources, targets = [], []
    for md5, size in sizes.items():
        sources.append(tmp_path / "cache" / md5[:2] / md5[2:])
        targets.append(tmp_path / "remote" / md5[:2] / md5[2:])
        sources[-1].parent.mkdir(parents=True)
        targets[-1].parent.mkdir(parents=True)
        sources[-1].write_bytes(b"x" * size)
    here, bar = LocalFileSystem(), Steps("objects to DVC", 0, "bytes")
    moved = TransferProgress(sizes, bar)
    generic.transfer(here, list(map(str, sources)), here, list(map(str, targets)), callback=moved)
    assert [path.stat().st_size for path in targets] == list(sizes.values())
    assert bar.done == sum(sizes.values())


def test_an_object_that_is_sent_again_counts_once() -> None:
    md5, bar = "ab" + "c" * 30, Steps("objects to DVC", 0, "bytes")
    with TransferProgress({md5: 100}, bar).branched(f"/x/ab/{'c' * 30}", "/y") as one:
        one.relative_update(80)
        one.absolute_update(0)
        one.relative_update(90)
        one.relative_update(80)
    assert bar.done == 100


def test_a_download_is_seen_growing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(runs, "LOOK_SECONDS", 0.01)
    seen = threading.Event()
    with shown("files from MLflow", 4_000_000, "bytes") as steps, runs.growing(tmp_path, steps):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights.pt").write_bytes(b"x" * 1_000_000)
        end = time.monotonic() + 20
        while time.monotonic() < end and not seen.wait(0.05):
            said = capsys.readouterr().err
            if "files from MLflow: 1.0/4.0 MB" in said:
                seen.set()
    assert seen.is_set()
