"""Long ways to the team and from it say how far they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dvc.fs import LocalFileSystem, generic
from dvc_data.hashfile.hash_info import HashInfo

from runkey import dvc_transfer, progress
from runkey.progress import progress as shown
from runkey.tracking import transfer as runs


class Bar:
    """What is shown of a transfer."""

    def __init__(self, what: str, total: float, unit: str) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0.0

    def advance(self, amount: float = 1, text: str = "", what: str = "") -> None:
        self.done += amount


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    made: list[Bar] = []

    @contextmanager
    def record(what: str, total: float, unit: str) -> Iterator[Bar]:
        made.append(Bar(what, total, unit))
        yield made[-1]

    monkeypatch.setattr(dvc_transfer, "progress", record)
    return made


def test_objects_are_counted_by_their_bytes_as_dvc_moves_them(
    tmp_path: Path, bars: list[Bar]
) -> None:
    sizes = {"aa" + "0" * 30: 5 << 20, "bb" + "1" * 30: 0, "cc" + "2" * 30: 7}
    sources, targets = [], []
    for md5, size in sizes.items():
        sources.append(tmp_path / "cache" / md5[:2] / md5[2:])
        targets.append(tmp_path / "remote" / md5[:2] / md5[2:])
        sources[-1].parent.mkdir(parents=True)
        targets[-1].parent.mkdir(parents=True)
        sources[-1].write_bytes(b"x" * size)
    here = LocalFileSystem()
    with dvc_transfer.TransferProgress(sizes, "objects to DVC") as moved:
        moved.start({HashInfo("md5", md5) for md5 in sizes})
        generic.transfer(
            here, list(map(str, sources)), here, list(map(str, targets)), callback=moved
        )
    assert [path.stat().st_size for path in targets] == list(sizes.values())
    (bar,) = bars
    assert (bar.total, bar.unit) == (sum(sizes.values()), "bytes")
    assert bar.done == sum(sizes.values())


def test_an_object_that_is_sent_again_counts_once(bars: list[Bar]) -> None:
    md5 = "ab" + "c" * 30
    with dvc_transfer.TransferProgress({md5: 100}, "objects to DVC") as moved:
        moved.start({HashInfo("md5", md5)})
        with moved.branched(f"/x/ab/{'c' * 30}", "/y") as one:
            one.relative_update(80)
            one.absolute_update(0)
            one.relative_update(90)
            one.relative_update(80)
    assert bars[0].done == 100


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
