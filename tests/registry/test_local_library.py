"""The cache of runs: looked up, queried, damaged, moved, used by several processes at once."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runkey.errors import RegistryError
from runkey.identity.record_cache import remove_record, update_record
from runkey.registry.library import LocalLibrary
from runkey.registry.query import Condition, Field, Kind, Query
from tests.support.records import key_of, make_run, write_record

REPOSITORY = Path(__file__).parents[2]
HOUR = 3_600_000


@pytest.fixture
def library(root: Path) -> LocalLibrary:
    return LocalLibrary(root / ".runkey")


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
    remove_record(Path(library.place), b.run.run_id)
    assert [r.run.metrics["eval/AP"] for r in library.find(best)] == [0.7, 0.3]


def test_damaged_records_are_named_and_left_out(
    root: Path, library: LocalLibrary, said: list[str]
) -> None:
    whole = make_run(root, key_of("a"))
    damage = {"b": "'{'", "c": "'[]'", "d": '\'{"schema": "record9"}\'', "e": "x'00ff'"}
    torn = {name: make_run(root, key_of(name)) for name in damage}
    with closing(sqlite3.connect(library.place)) as database, database:
        for name, text in damage.items():
            run = torn[name].run.run_id
            database.execute(f"UPDATE runs SET details = {text} WHERE run = ?", (run,))
    for found in (library.find(Query()), library.matching("rk2-")):
        assert found == [whole]
    for record in torn.values():
        assert sum(record.run.run_id in line for line in said) == 2
    assert all("\n" not in line and "`runkey index`" in line for line in said)


@pytest.mark.parametrize(
    "value",
    ["'?'", "'nan'", "x'ff00'", "CAST(x'ff' AS TEXT)", "'2020-13-45'", "''", "9e999", "NULL"],
)
@pytest.mark.parametrize("column", ["started", "ended", "name", "status"])
def test_a_cell_of_a_wrong_type_spoils_no_other_run(
    root: Path, library: LocalLibrary, said: list[str], column: str, value: str
) -> None:
    whole = make_run(root, key_of("a"))
    torn = make_run(root, key_of("b"))
    with closing(sqlite3.connect(library.place)) as database, database:
        statement = f"UPDATE runs SET {column} = {value} WHERE run = ?"
        database.execute(statement, (torn.run.run_id,))
    for sort in ("started", "ended", "seconds", "name"):
        condition = Condition(Field("run", "started"), ">", "0")
        for conditions in ((), (condition,)):
            found = library.find(Query(conditions=conditions, sort=Field("run", sort)))
            assert whole in found
    assert all("\n" not in line and torn.run.run_id in line for line in said)


@pytest.mark.parametrize("value", ["'{'", "'[]'", "NULL", "x'00ff'", "CAST(x'7b22ff' AS TEXT)"])
@pytest.mark.parametrize("column", ["metrics", "params", "tags"])
def test_a_question_about_damaged_values_answers_for_the_other_runs(
    root: Path, library: LocalLibrary, said: list[str], column: Kind, value: str
) -> None:
    values: Any = {column: {"lr": 0.1 if column == "metrics" else "0.1"}}
    whole, torn = (make_run(root, key_of(name), **values) for name in "ab")
    with closing(sqlite3.connect(library.place)) as database, database:
        statement = f"UPDATE runs SET {column} = {value} WHERE run = ?"
        database.execute(statement, (torn.run.run_id,))
    field = Field(column, "lr")
    questions = (
        Query(sort=field),
        Query(conditions=(Condition(field, ">", "0"),)),
        Query(conditions=(Condition(field, ">", "0"),), sort=field, limit=1),
        Query(),
    )
    for query in questions:
        assert library.find(query) == [whole]
        (line,) = said
        assert f"run {torn.run.run_id}: its record is damaged" in line
        said.clear()


@pytest.mark.parametrize("damage", ["text", "cut", "other version", "folder"])
def test_a_damaged_cache_is_named_and_made_anew_by_the_next_run(
    root: Path, library: LocalLibrary, damage: str
) -> None:
    records = [make_run(root, key_of(str(n)), started_ms=n * HOUR) for n in range(40)]
    assert library.find(Query()) == records[::-1]
    cache = Path(library.place)
    content = cache.read_bytes()
    cache.unlink()
    match damage:
        case "text":
            cache.write_bytes(b"no database" * 1000)
        case "cut":
            cache.write_bytes(content[: len(content) // 2])
        case "other version":
            with closing(sqlite3.connect(cache)) as database, database:
                database.execute("CREATE TABLE runs (x)")
                database.execute("CREATE TABLE tags (file TEXT PRIMARY KEY, json TEXT)")
                database.execute("PRAGMA user_version = 1")
        case "folder":
            cache.mkdir()
    asked: list[Callable[[], object]] = [
        lambda: library.find(Query()),
        lambda: library.matching("rk2-"),
    ]
    for ask in asked:
        with pytest.raises(RegistryError, match="`runkey index` writes it again") as caught:
            ask()
        assert str(cache) in str(caught.value)
    if damage == "folder":
        with pytest.raises(OSError, match=re.escape(str(cache))):
            make_run(root, key_of("new"))
        return
    new = make_run(root, key_of("new"))
    assert library.find(Query()) == [new]


def test_an_empty_file_is_a_cache_that_is_being_made(root: Path, library: LocalLibrary) -> None:
    (root / ".runkey").mkdir()
    Path(library.place).write_bytes(b"")
    assert library.find(Query()) == []
    record = make_run(root, key_of("a"))
    assert library.find(Query()) == [record]


def test_records_of_an_older_runkey_are_not_taken_for_none(
    root: Path, library: LocalLibrary
) -> None:
    (root / ".runkey" / "runs").mkdir(parents=True)
    with pytest.raises(RegistryError, match="older records are; `runkey index`"):
        library.matching("rk2-")


def test_a_cache_that_another_holds_locked_is_read_as_it_was(
    root: Path, library: LocalLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runkey.identity.record_cache._BUSY_SECONDS", 0.1)
    first = make_run(root, key_of("a"))
    with closing(sqlite3.connect(library.place, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("DELETE FROM runs")
        assert library.find(Query()) == [first]
        with pytest.raises(OSError, match="locked"):
            make_run(root, key_of("b"))
        holder.execute("ROLLBACK")
    assert library.find(Query()) == [first]


def test_a_read_only_cache_is_read(root: Path, library: LocalLibrary) -> None:
    record = make_run(root, key_of("a"))
    Path(library.place).chmod(0o400)
    (root / ".runkey").chmod(0o500)
    try:
        assert library.find(Query()) == [record]
    finally:
        (root / ".runkey").chmod(0o700)


def test_details_stay_when_only_the_run_is_written(root: Path, library: LocalLibrary) -> None:
    record = make_run(root, key_of("a"))
    run = replace(record.run, name="other")
    update_record(Path(library.place), run)
    assert library.find(Query()) == [replace(record, run=run)]
    write_record(Path(library.place), replace(record, details=None))
    assert library.find(Query()) == [replace(record, details=None)]


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
from runkey.registry.library import LocalLibrary
from runkey.registry.query import Query
from tests.support.records import key_of, make_run, write_record
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
