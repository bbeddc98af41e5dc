"""`runkey index` on a real sqlite store: what it writes is what was there."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.identity.record import DETAILS, Record
from runkey.identity.record_cache import rebuild
from runkey.registry.library import LocalLibrary
from runkey.tracking.store import Store, locate_store, open_client
from runkey.tracking.transfer import logged_run
from tests.support.command_line import Run
from tests.support.records import write_record
from tests.support.stored_runs import KEYS, log_runs


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    root = tmp_path_factory.mktemp("stored")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    store = Store(uri, root / "mlartifacts", root / ".runkey")
    records = log_runs(store, tmp_path_factory.mktemp("scratch"))
    return root, records


@pytest.fixture
def recorded(root: Path, stored: tuple[Path, list[Record]]) -> tuple[Store, list[Record]]:
    """A copy of the store, which so is a checkout that was copied, with its records."""
    shutil.copytree(stored[0], root, dirs_exist_ok=True)
    store = locate_store(root)
    client = open_client(store)  # adopts the copied artifacts
    records = [
        Record(run=logged_run(client.get_run(record.run.run_id)), details=record.details)
        for record in stored[1]
    ]
    for record in records:
        write_record(store.home / "runs.sqlite", record)
    return store, records


def test_commands_say_the_same_after_everything_was_lost(
    recorded: tuple[Store, list[Record]], run: Run
) -> None:
    store, records = recorded
    commands = [
        ("list",), ("list", "--sort", "AP"), ("list", "--where", "lr=1e-05"),
        *(("show", key) for key in KEYS), ("show", f"{KEYS[0]}:{records[-1].run.run_id}"),
        ("open", KEYS[0], KEYS[1], "--port", "1"),
    ]  # fmt: skip
    before = [run(*command, "--json") for command in commands]
    assert all(code == 0 for code, _, _ in before)
    shutil.rmtree(store.home)
    assert json.loads(run("list", "--json")[1]) == []
    code, out, _ = run("index", "--json")
    assert (code, json.loads(out)) == (0, {"runs": 5, "written": 5, "removed": 0})
    assert [run(*command, "--json") for command in commands] == before
    assert json.loads(run("index", "--json")[1]) == {"runs": 5, "written": 0, "removed": 0}


def test_it_says_how_far_it_is(
    recorded: tuple[Store, list[Record]], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand runs take a minute and a half; the run of somebody else is not counted."""
    monkeypatch.setattr("runkey.progress.EVERY_SECONDS", 0.0)
    _, _, err = run("index")
    count = len(recorded[1])
    assert err.splitlines() == [f"index: {n}/{count} runs" for n in range(1, count)]


def test_wrong_records_are_mended_and_strange_ones_removed(
    recorded: tuple[Store, list[Record]], run: Run
) -> None:
    store, records = recorded
    library = LocalLibrary(store.home)
    torn, changed, deleted = (record.run.run_id for record in records[:3])
    good = [same(record) for record in library.matching("") if record.run.run_id != deleted]
    gone = replace(records[0], run=replace(records[0].run, run_id="0" * 32))
    write_record(Path(library.place), gone)
    with closing(sqlite3.connect(library.place)) as database, database:
        database.execute("UPDATE runs SET details = '{' WHERE run = ?", (torn,))
        other = "params = replace(params, '1e-05', '9e-05')"
        database.execute(f"UPDATE runs SET {other} WHERE run = ?", (changed,))
    open_client(store).delete_run(deleted)
    code, out, _ = run("index")
    assert code == 0
    assert "4 runs in MLflow: 2 records written, 2 removed" in out
    assert [same(record) for record in library.matching("")] == good


@pytest.mark.parametrize("is_deleted", [True, False])
def test_what_reads_a_lost_cache_names_the_command_that_makes_it_anew(
    recorded: tuple[Store, list[Record]], run: Run, *, is_deleted: bool
) -> None:
    store, _ = recorded
    store.cache.unlink()
    if not is_deleted:
        store.cache.touch()
    way_out = "if it was lost, `runkey index` reads the runs from MLflow again"
    assert run("list") == (0, f"no run in {store.cache}; {way_out}\n", "")
    key = KEYS[0]
    commands = [("diff", key, "."), ("export", key, "run.zip"), ("delete", key)]
    for command in (*commands, *((name, key) for name in ("show", "verify", "get", "report"))):
        code, out, err = run(*command)
        assert (code, out, err.count("\n")) == (1, "", 1), command
        assert "`runkey index` reads lost ones from MLflow again" in err, command
    run("index")
    assert run("show", key)[0] == 0
    assert "`runkey list` shows what is there" in run("show", "rk2-0000")[2]


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_lost_or_damaged_cache_is_made_anew(
    recorded: tuple[Store, list[Record]], run: Run, content: bytes
) -> None:
    store, _ = recorded
    cache = store.home / "runs.sqlite"
    before = run("list", "--json")
    cache.write_bytes(content)
    code, out, _ = run("index", "--json")
    assert (code, json.loads(out)) == (0, {"runs": 5, "written": 5, "removed": 0})
    assert run("list", "--json") == before


def test_records_written_before_the_clock_was_set_back_are_mended(
    recorded: tuple[Store, list[Record]], run: Run
) -> None:
    store, _ = recorded
    before = run("list", "--json")
    with closing(sqlite3.connect(store.home / "runs.sqlite")) as cache, cache:
        cache.execute("UPDATE runs SET name = 'wrong', written_ns = written_ns + 1000000000000000")
    assert run("list", "--json") != before
    assert json.loads(run("index", "--json")[1]) == {"runs": 5, "written": 5, "removed": 0}
    assert run("list", "--json") == before


@pytest.mark.parametrize("damage", ["text", "cut", "other version"])
@pytest.mark.parametrize("written_to", [False, True])
def test_a_damaged_cache_is_rebuilt_by_the_command_that_reads_it(
    recorded: tuple[Store, list[Record]], run: Run, damage: str, written_to: bool
) -> None:
    """Also if a training has made it anew meanwhile, with nothing but its own run."""
    store, records = recorded
    before = run("list", "--json")
    damage_cache(store.cache, damage)
    if written_to:
        write_record(store.cache, records[2])
    assert run("list", "--json") == before
    assert run("show", KEYS[0])[::2] == (0, "")
    assert json.loads(run("index", "--json")[1]) == {"runs": 5, "written": 0, "removed": 0}


def damage_cache(cache: Path, damage: str) -> None:
    content = cache.read_bytes()
    match damage:
        case "text":
            cache.write_bytes(b"no database" * 1000)
        case "cut":
            cache.write_bytes(content[: len(content) // 2])
        case "other version":
            with closing(sqlite3.connect(cache)) as database, database:
                database.execute("PRAGMA user_version = 1")


def test_a_damaged_cache_that_cannot_be_rebuilt_is_named(
    recorded: tuple[Store, list[Record]], run: Run
) -> None:
    store, _ = recorded
    damage_cache(store.cache, "text")
    assert store.database
    store.database.unlink()
    code, out, err = run("list")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "`runkey index` writes it again" in err


@pytest.mark.parametrize("data", [b"", b"no database" * 100, b"SQLite format 3\0" + bytes(5000)])
def test_a_database_without_tables_is_named_with_the_way_out(
    recorded: tuple[Store, list[Record]], run: Run, data: bytes
) -> None:
    store, _ = recorded
    assert store.database
    store.database.write_bytes(data)
    code, out, err = run("index")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{store.database}: MLflow's database cannot be read (" in err
    assert "put a copy of the file back, or move it away: the next run makes a new one" in err
    assert run("list")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "line"),
    [
        (
            "postgresql://me:hidden@nowhere/x",
            r"code 1 \(ModuleNotFoundError: No module named '\w+'\): install that driver into",
        ),
        ("klingon://nowhere/x", r"code \d \(.*\); is MLFLOW_TRACKING_URI right\?"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    root: Path, run: Run, monkeypatch: pytest.MonkeyPatch, address: str, line: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    code, _, err = run("index")
    assert code == 1
    assert re.search(f"^error: mlflow server ended with {line}", err, re.MULTILINE)
    assert "hidden" not in err


@pytest.mark.slow
def test_a_database_that_only_mlflow_can_read_is_read_through_its_server(
    recorded: tuple[Store, list[Record]], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = recorded
    before = run("list", "--json")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite+pysqlite:///{store.database}")
    assert json.loads(run("index", "--json")[1]) == {"runs": 5, "written": 0, "removed": 0}
    store.cache.unlink()
    assert json.loads(run("index", "--json")[1]) == {"runs": 5, "written": 5, "removed": 0}
    assert run("list", "--json") == before


def test_records_of_an_older_runkey_are_replaced(
    recorded: tuple[Store, list[Record]], run: Run
) -> None:
    """It kept one file a run, in a folder."""
    store, _ = recorded
    (store.home / "runs.sqlite").unlink()
    (store.home / "runs").mkdir()
    (store.home / "runs" / f"{KEYS[0]}-00.json").write_text("{}")
    assert run("list")[::2] == (0, "")
    assert not (store.home / "runs").exists()
    assert len(json.loads(run("list", "--json")[1])) == 5


def test_a_run_that_changes_meanwhile_is_left_as_it_is(
    recorded: tuple[Store, list[Record]],
) -> None:
    store, records = recorded
    cache = store.home / "runs.sqlite"
    new = replace(records[0], run=replace(records[0].run, run_id="0" * 32))
    now = replace(records[1], run=replace(records[1].run, name="now"))

    def read() -> Iterator[Record]:
        yield from records[:1]
        write_record(cache, new)
        write_record(cache, now)
        yield from records[1:]

    assert rebuild(cache, read()).removed == 0
    names = {r.run.run_id: r.run.name for r in LocalLibrary(store.home).matching("")}
    assert len(names) == len(records) + 1
    assert names[now.run.run_id] == "now"


def same(record: Record) -> str:
    """As text, in which nan is nan."""
    return json.dumps(record.as_dict(), sort_keys=True)


def test_details_that_cannot_be_read_are_named(
    recorded: tuple[Store, list[Record]], run: Run
) -> None:
    store, records = recorded
    assert store.artifacts
    (path,) = store.artifacts.rglob(f"{records[1].run.run_id}/artifacts/{DETAILS}")
    path.write_text("{")
    code, _, err = run("index")
    assert code == 0
    assert records[1].run.run_id in err
    assert "without its details" in err
    shown = json.loads(run("show", KEYS[1], "--json")[1])
    assert shown["details"] is None


def test_without_a_store_it_says_what_to_do(root: Path, run: Run) -> None:
    code, _, err = run("index")
    assert code == 1
    assert "make repro" in err
    assert not (root / "mlflow.db").exists()
