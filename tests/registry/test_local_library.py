"""Records' files: looked up, asked about, damaged, moved, read by several processes at once."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.registry.reading.local_library import LocalLibrary
from runkey.registry.reading.query import Condition, Field, Query
from tests.support.records import key_of, make_run

REPOSITORY = Path(__file__).parents[2]
HOUR = 3_600_000


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def library(root: Path, said: list[str]) -> LocalLibrary:
    return LocalLibrary(root / ".runkey", said.append)


def test_runs_of_a_prefix_come_oldest_first(root: Path, library: LocalLibrary) -> None:
    key = key_of("a")
    late = make_run(root, key, "f" * 32, started_ms=2 * HOUR)
    early = make_run(root, key, "e" * 32, started_ms=HOUR)
    make_run(root, key_of("b"))
    assert library.matching(key[:12]) == [early, late]
    assert library.matching("rk2-0000000") == []
    assert len(library.matching("rk2-")) == 3


def test_an_empty_place_has_no_runs(library: LocalLibrary) -> None:
    assert library.matching("rk2-") == []
    assert library.find(Query()) == []


def test_records_that_change_come_and_go_are_seen(root: Path, library: LocalLibrary) -> None:
    best = Query(sort=Field("metrics", "eval/AP"))
    make_run(root, key_of("a"), metrics={"eval/AP": 0.1})
    b = make_run(root, key_of("b"), metrics={"eval/AP": 0.2})
    assert [r.run.metrics["eval/AP"] for r in library.find(best)] == [0.2, 0.1]
    make_run(root, key_of("a"), metrics={"eval/AP": 0.7})
    make_run(root, key_of("c"), metrics={"eval/AP": 0.3})
    (library.folder / b.file_name).unlink()
    assert [r.run.metrics["eval/AP"] for r in library.find(best)] == [0.7, 0.3]


def test_files_that_are_no_records_are_named_and_left_out(
    root: Path, library: LocalLibrary, said: list[str]
) -> None:
    whole = make_run(root, key_of("a"))
    torn = make_run(root, key_of("b"))
    other = make_run(root, key_of("c"))
    path = library.folder / torn.file_name
    path.write_bytes(path.read_bytes()[:100])
    (library.folder / other.file_name).rename(library.folder / f"{key_of('d')}-aa.json")
    (library.folder / "notes.txt").write_text("x")
    for found in (library.find(Query()), library.matching("rk2-"), library.find(Query())):
        assert found == [whole]
    assert any(torn.file_name in line and "not JSON" in line for line in said)
    assert any(f"{key_of('d')}-aa.json" in line for line in said)
    assert any("notes.txt" in line for line in said)
    assert all("\n" not in line for line in said)


def test_a_record_that_is_being_written_is_none(
    root: Path, library: LocalLibrary, said: list[str]
) -> None:
    record = make_run(root, key_of("a"))
    (library.folder / ".0123.77").write_text("{")
    assert library.find(Query()) == [record]
    assert said == []


@pytest.mark.parametrize("damage", ["text", "empty", "other tables", "folder", "cut"])
def test_a_damaged_cache_costs_time_and_nothing_else(
    root: Path, library: LocalLibrary, damage: str
) -> None:
    records = [make_run(root, key_of(str(n)), started_ms=n * HOUR) for n in range(40)]
    expected = records[::-1]
    assert library.find(Query()) == expected
    cache = root / ".runkey" / "runs.sqlite"
    content = cache.read_bytes()
    cache.unlink()
    match damage:
        case "text":
            cache.write_bytes(b"no database" * 1000)
        case "empty":
            cache.write_bytes(b"")
        case "cut":
            cache.write_bytes(content[: len(content) // 2])
        case "other tables":
            with sqlite3.connect(cache) as database:
                database.execute("CREATE TABLE runs (x)")
                database.execute("PRAGMA user_version = 1")
            database.close()
        case "folder":
            cache.mkdir()
    assert library.find(Query()) == expected
    assert library.find(Query()) == expected


def test_a_cache_that_another_holds_locked_is_done_without(
    root: Path, library: LocalLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runkey.registry.reading.record_cache._BUSY_SECONDS", 0.1)
    first = make_run(root, key_of("a"))
    assert library.find(Query()) == [first]
    holder = sqlite3.connect(root / ".runkey" / "runs.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    second = make_run(root, key_of("b"), started_ms=first.run.started_ms + 1)
    assert library.find(Query()) == [second, first]
    holder.execute("ROLLBACK")
    held = holder.execute("SELECT count(*) FROM runs").fetchone()[0]
    holder.close()
    assert held == 1, "the locked cache was left as it was"


def test_not_a_number_sorts_after_numbers_and_before_nothing(
    root: Path, library: LocalLibrary
) -> None:
    for name, metrics in {
        "a": {"m": 2.0},
        "b": {"m": float("nan")},
        "c": {},
        "d": {"m": -3},
    }.items():
        make_run(root, key_of(name), metrics=metrics, name=name)
    for descending, expected in ((True, "adbc"), (False, "dabc")):
        query = Query(sort=Field("metrics", "m"), descending=descending)
        assert "".join(r.run.name for r in library.find(query)) == expected
    above = Query(conditions=(Condition(Field("metrics", "m"), ">", "-5"),))
    assert {r.run.name for r in library.find(above)} == {"a", "d"}


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_artifacts_are_found_beside_the_store_wherever_it_is(
    root: Path, tmp_path: Path, how: str
) -> None:
    record = make_run(root, key_of("a"), files={"model/w": b"abc"})
    there = tmp_path / "elsewhere"
    (shutil.move if how == "moved" else shutil.copytree)(root, there)
    library = LocalLibrary(there / ".runkey")
    assert library.path_of(record, "model/w").is_relative_to(there)
    with library.open_file(record, "model/w") as file:
        assert file.read() == b"abc"


def test_artifacts_elsewhere_are_read_where_they_are(root: Path, tmp_path: Path) -> None:
    record = make_run(tmp_path / "other disk", key_of("a"), files={"w": b"abc"})
    with LocalLibrary(root / ".runkey").open_file(record, "w") as file:
        assert file.read() == b"abc"


@pytest.mark.parametrize("path", ["gone", "../../outside", "/etc/passwd", "model", "a\\b", ""])
def test_what_cannot_be_read_is_named(root: Path, library: LocalLibrary, path: str) -> None:
    record = make_run(root, key_of("a"))
    with pytest.raises(RegistryError, match="rk2-") as caught:
        library.open_file(record, path)
    assert path in str(caught.value) or repr(path) in str(caught.value)


def test_artifacts_on_no_disk_of_ours_are_named(root: Path, library: LocalLibrary) -> None:
    record = make_run(root, key_of("a"), artifact_uri="s3://bucket/1/artifacts")
    with pytest.raises(RegistryError, match="s3://bucket"):
        library.open_file(record, "run.json")


ASK = """
import sys
from pathlib import Path
from runkey.registry.reading.local_library import LocalLibrary
from runkey.registry.reading.query import Query
from tests.support.records import key_of, make_run
root, name = Path(sys.argv[1]), sys.argv[2]
library = LocalLibrary(root / ".runkey")
for number in range(15):
    made = make_run(root, key_of(f"{name}-{number}"), name=name)
    mine = [r for r in library.find(Query()) if r.run.name == name]
    assert len(mine) == number + 1, (len(mine), number)
"""


def test_several_processes_write_and_ask_at_once(root: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, str(root), f"p{n}"],
            cwd=REPOSITORY,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert errors == [""] * 4
    assert [process.returncode for process in processes] == [0] * 4
    assert len(LocalLibrary(root / ".runkey").find(Query())) == 60
