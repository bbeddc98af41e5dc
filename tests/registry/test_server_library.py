"""A real `mlflow server`: its runs are the same as those of its own database."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.record import Record
from runkey.registry.dvc_cache import download
from runkey.registry.library import LocalLibrary, ServerLibrary, find_run, open_library
from runkey.registry.lineage import children, draw, family, origin, parent_of
from runkey.registry.query import Field, Query, parse_condition
from runkey.tracking.store import (
    Store,
    free_port,
    open_client,
    start_server,
    stop_server,
    wait_until_healthy,
)
from runkey.tracking.transfer import logged_run
from tests.support.command_line import Run
from tests.support.records import write_record
from tests.support.stored_runs import KEYS, log_runs

pytestmark = pytest.mark.slow

Both = tuple[ServerLibrary, LocalLibrary]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """The same runs on a server and in the local cache."""
    root = tmp_path_factory.mktemp("served")
    store = Store(f"sqlite:///{root / 'mlflow.db'}", root / "mlartifacts", root / ".runkey")
    records = log_runs(store, tmp_path_factory.mktemp("scratch"))
    client = open_client(store)
    for record in records:
        run = logged_run(client.get_run(record.run.run_id))
        write_record(root / ".runkey" / "runs.sqlite", replace(record, run=run))
    (artifacts,) = (root / "mlartifacts").glob(f"{records[0].run.run_id}/artifacts")
    for path, content in {"run.json": b"{}", "model/weights.pt": b"weights"}.items():
        (artifacts / path).parent.mkdir(exist_ok=True)
        (artifacts / path).write_bytes(content)
    process = start_server(store, port := free_port())
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, process)
        server = open_library(address, root)
        assert isinstance(server, ServerLibrary)
        yield server, LocalLibrary(root / ".runkey")
    finally:
        stop_server(process)


def test_lineage_is_the_same(both: Both) -> None:
    """A server finds children by a tag; the cache goes through the parameters."""
    for library in both:
        parent, child = (find_run(library, key) for key in KEYS[1:3])
        assert [one.key for one in children(library, parent)] == [KEYS[2]]
        assert children(library, child) == []
        began = origin(library, child)
        assert began
        assert began.key == KEYS[1]
        found = parent_of(library, began)
        assert found
        assert found.key == KEYS[1]
        lines = list(draw(family(library, child)))
        assert [line.split()[0] for line in lines] == [KEYS[1][:16], "`-"]


def same(record: Record) -> str:
    """As text, in which nan is nan."""
    return json.dumps(record.as_dict(), sort_keys=True)


def test_runs_are_the_same_in_all_they_hold(both: Both) -> None:
    server, local = both
    there = [server.with_details(record) for record in server.matching("rk2-")]
    assert [same(r) for r in there] == [same(r) for r in local.matching("rk2-")]
    assert same(find_run(server, KEYS[0][:10])) == same(find_run(local, KEYS[0][:10]))
    assert find_run(server, KEYS[3]).details is None
    with pytest.raises(RegistryError, match="no run of that key in http://"):
        find_run(server, "rk2-00000000")


@pytest.mark.parametrize(
    ("conditions", "sort", "descending", "limit"),
    [
        ((), "started", True, None),
        ((), "started", False, 2),
        ((), "eval/AP", True, 2),
        ((), "eval/AP", False, None),
        ((), "lr", True, 3),
        ((), "odd", True, None),
        ((), "seconds", True, None),
        (("eval/AP>0.2",), "started", True, None),
        (("lr=1e-5",), "started", True, None),
        (("lr<2.5e-5",), "eval/AP", True, 2),
        (("lr!=1e-5", "status=finished"), "started", True, 1),
        (("status=RUNNING",), "started", True, None),
        (("name~RUN 1",), "started", True, None),
        (("text~'x'",), "started", True, 2),
        (("host=here", "run~a"), "started", True, None),
        (("started>2030-01-01",), "started", True, None),
        (("reproduction_of~a",), "started", True, None),
    ],
)
def test_questions_have_the_same_answers(
    both: Both, conditions: tuple[str, ...], sort: str, descending: bool, limit: int | None
) -> None:
    server, local = both
    known = [record.run for record in local.matching("rk2-")]
    fields = {"lr": Field("params", "lr"), "odd": Field("metrics", "odd")}
    kind = Field("metrics", sort) if "/" in sort else Field("run", sort)
    query = Query(
        conditions=tuple(parse_condition(text, lambda: known) for text in conditions),
        sort=fields.get(sort, kind),
        descending=descending,
        limit=limit,
    )
    assert [same(replace(r, details=None)) for r in local.find(query)] == [
        same(r) for r in server.find(query)
    ]


def test_files_come_and_are_checked(both: Both, tmp_path: Path) -> None:
    server, _ = both
    record = find_run(server, KEYS[0])
    download(server, record, ["run.json", "model/weights.pt"], tmp_path / "x")
    assert (tmp_path / "x/model/weights.pt").read_bytes() == b"weights"
    with pytest.raises(RegistryError, match=r"logs/train.jsonl: not to be had"):
        download(server, record, ["run.json", "logs/train.jsonl"], tmp_path / "y")
    assert list((tmp_path / "y").iterdir()) == []


def test_commands(both: Both, root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = both
    code, _, _ = run("index")
    assert code == 1, "no store here"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.place)
    code, out, _ = run("list", "--sort", "AP")
    assert code == 0
    assert KEYS[3][:16] in out
    code, out, _ = run("show", KEYS[1])
    assert code == 0
    assert f"{server.place}/#/experiments/" in out
    seen = LocalLibrary(root / ".runkey", uri=server.place).matching("rk2-")
    assert [(record.key, record.details is None) for record in seen] == [(KEYS[1], False)]
    assert run("index")[0] == 0
    assert run("open", KEYS[0])[2] == "", "the server listens"
    assert run("get", KEYS[0], "--only", "run.json")[0] == 0
    assert shutil.rmtree(root / KEYS[0][:16]) is None


def test_an_address_where_nothing_answers(
    root: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    code, out, err = run("list")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "cannot be reached" in err
