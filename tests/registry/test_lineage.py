"""Lineage: from which run another was started, as `show`, `diff` and the report tell it."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import RecipeError
from runkey.hashing import sha256_bytes
from runkey.identity.pinned_weights import IMAGENET
from runkey.identity.record import Details, LoggedRun, Record, StartedFrom
from runkey.identity.record_cache import remove_record
from runkey.registry.library import LocalLibrary, find_run
from runkey.registry.lineage import children, draw, family, origin, started_from
from tests.support.command_line import Run
from tests.support.records import FILES, key_of, make_run, write_record

A, B, C, D = (key_of(name) for name in "abcd")
NAMES = {A: "baseline", B: "lr=5e-05", C: "epochs=9", D: "data.path=balls"}
WEIGHTS = "model/weights.safetensors"

Make = Callable[..., Record]


@pytest.fixture
def make(root: Path) -> Make:
    """Make a run whose weights are its key, started from those of a parent."""

    def one(
        key: str,
        parent: str | None = None,
        *,
        recorded: bool = True,
        named: bool = True,
        param: str = "model.init_from",
    ) -> Record:
        weights = sha256_bytes((parent or "").encode())
        keyed = {param: f"sha256:{weights} model.json:{'0' * 64}"} if parent else {}
        files = FILES | {
            WEIGHTS: key.encode(),
            "model/key.json": json.dumps({"preimages": {"params": keyed}}).encode(),
        }
        value = {param: parent[:16]} if parent else {}
        changes = {}
        tags = {"key": key}
        if parent and recorded:
            began = StartedFrom(param=param, weights=weights, key=parent if named else None)
            changes["started_from"] = began
            tags |= {name: tag for name, tag in began.tags.items() if tag}
        params = {"key": key, "model.init_from": "null", "model.backbone_weights": "none"}
        return make_run(
            root, key, files=files, name=NAMES[key], params=params | value | {"key.data": "d" * 64},
            tags=tags, started_ms=1_700_000_000_000 + list(NAMES).index(key), **changes,
        )  # fmt: skip

    return one


def library(root: Path) -> LocalLibrary:
    return LocalLibrary(root / ".runkey")


def test_show_names_parent_and_children(make: Make, run: Run) -> None:
    make(A)
    make(B, A)
    make(C, B, param="model.backbone_weights")
    make(D, B)
    _, out, _ = run("show", B)
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("started from"))
    assert lines[at : at + 3] == [
        f"started from {A[:16]}  AP 0.500  data dddddd  baseline (model.init_from)",
        f"continued by {C[:16]}  AP 0.500  data dddddd  epochs=9",
        f"             {D[:16]}  AP 0.500  data dddddd  data.path=balls",
    ]
    _, out, _ = run("show", A)
    assert "started from" not in out
    assert f"continued by {B[:16]}" in out
    shown = json.loads(run("show", B, "--json")[1])
    assert shown["started_from"] == shown["details"]["started_from"]
    assert (shown["started_from"]["key"], shown["continued_by"]) == (A, [C, D])


def test_published_weights_are_named_with_their_licence(make: Make, run: Run, root: Path) -> None:
    row = IMAGENET["lite0"]
    began = StartedFrom(param="model.backbone_weights", weights=row.sha256, key=None)
    tags = {name: tag for name, tag in began.tags.items() if tag}
    one = make(A)
    write_record(
        root / ".runkey" / "runs.sqlite",
        replace(one, run=replace(one.run, tags=one.run.tags | tags)),
    )
    out = " ".join(run("show", A)[1].split())
    assert f"started from {row.name}: {row.file} of " in out
    assert f"sha256 {row.sha256}, Apache-2.0 (model.backbone_weights)" in out
    lines = run("show", A, "--lineage")[1].splitlines()
    assert lines[0].startswith(f"{row.name}: {row.file}")
    assert lines[1].startswith(f"`- {A[:16]}")


@pytest.mark.parametrize("weights", ["none", "imagenet", "null"])
def test_runs_that_began_with_no_file_are_not_read(
    make: Make, run: Run, root: Path, weights: str
) -> None:
    """Of ten thousand runs these are nearly all."""
    make(A)
    other = make(B)
    params = other.run.params | {"model.backbone_weights": weights}
    write_record(
        root / ".runkey" / "runs.sqlite", replace(other, run=replace(other.run, params=params))
    )
    with closing(sqlite3.connect(root / ".runkey" / "runs.sqlite")) as database, database:
        database.execute("UPDATE runs SET details = '{' WHERE key = ?", (B,))
    code, _, err = run("show", A)
    assert (code, err) == (0, "")


def test_the_tree(make: Make, run: Run) -> None:
    make(A)
    make(B, A)
    make(C, B)
    make(D, A)
    code, out, err = run("show", C, "--lineage")
    assert (code, err) == (0, "")
    text = "AP 0.500  data dddddd "
    assert out.splitlines() == [
        f"{A[:16]}  {text} baseline",
        f"|- {B[:16]}  {text} lr=5e-05",
        f"|  `- {C[:16]}  {text} epochs=9  <- this run",
        f"`- {D[:16]}  {text} data.path=balls",
    ]
    tree = json.loads(run("show", C, "--lineage", "--json")[1])
    assert (tree["key"], tree["AP"], tree["data"]) == (A, 0.5, "d" * 64)
    assert tree["children"][0]["children"][0]["is_asked"]


def test_a_missing_parent_is_named(make: Make, run: Run, root: Path) -> None:
    parent = make(A)
    make(B, A)
    make(C, B)
    remove_record(root / ".runkey/runs.sqlite", parent.run.run_id)
    _, out, _ = run("show", C, "--lineage")
    first, second, third = out.splitlines()
    fetch = f"`runkey fetch {A[:16]}` looks on the team's server"
    assert first == f"{A[:16]}: missing here; {fetch}"
    assert second.startswith(f"`- {B[:16]}")
    assert third.startswith(f"   `- {C[:16]}")
    assert f"started from {A[:16]}: missing here; `runkey fetch" in " ".join(
        run("show", B)[1].split()
    )


def test_a_file_of_nobody_is_named_by_its_hash(make: Make, run: Run, root: Path) -> None:
    make(B, A, named=False)
    assert f"weights {sha256_bytes(A.encode())[:12]} of no recorded run" in run("show", B)[1]
    make(A)  # fetched later
    assert f"started from {A[:16]}  AP" in run("show", B)[1]
    assert [one.key for one in children(library(root), find_run(library(root), A))] == [B]


def test_runs_from_before_it_was_recorded(make: Make, run: Run, root: Path) -> None:
    make(A)
    made = make(B, A, recorded=False)
    assert made.started_from is None
    found = origin(library(root), made)
    assert found == StartedFrom(param="model.init_from", weights=sha256_bytes(A.encode()), key=A)
    assert f"continued by {B[:16]}" in run("show", A)[1]
    # Without key.json: by the key that the parameter names.
    (root / "mlartifacts" / made.run.run_id / "artifacts/model/key.json").unlink()
    assert origin(library(root), made) == found


def test_weights_that_two_runs_have_are_of_the_named_one(root: Path) -> None:
    files = FILES | {WEIGHTS: b"the same"}
    weights = sha256_bytes(b"the same")
    for number, key in enumerate((A, B)):
        make_run(root, key, files=files, started_ms=1_700_000_000_000 + number)
    keyed = {"model.init_from": f"sha256:{weights}", "model.backbone_weights": "none"}
    cache = library(root).path
    for value, expected in ((B[:9], B), (B[4:20], B), ("got/model", A), (A, A)):
        began = started_from(keyed, {"model.init_from": value}, cache)
        assert began == StartedFrom(param="model.init_from", weights=weights, key=expected), value
    assert started_from({"model.init_from": None}, {"model.init_from": None}, cache) is None
    other = started_from({"model.init_from": f"sha256:{'1' * 64}"}, {"model.init_from": "x"}, cache)
    assert other == StartedFrom(param="model.init_from", weights="1" * 64, key=None)


def test_forged_circles_end(make: Make, root: Path) -> None:
    make(A, B)
    make(B, A)
    lines = list(draw(family(library(root), find_run(library(root), A))))
    assert len(lines) == 2
    make(C, C)
    assert len(list(draw(family(library(root), find_run(library(root), C))))) == 1


def test_what_is_no_key_is_refused() -> None:
    good = {"param": "model.init_from", "weights": "0" * 64, "key": A}
    StartedFrom(**good)
    for change in ({"key": "rk2-'; DROP"}, {"weights": "x"}, {"param": "lr"}):
        with pytest.raises(ValueError, match="is no"):
            StartedFrom(**(good | change))
    forged = LoggedRun(
        run_id="a" * 32, experiment_id="1", name="", status="FINISHED", started_ms=0, ended_ms=1,
        artifact_uri="", params={"key": A}, metrics={},
        tags={"started_from": "rk2-%", "started_from.weights": "0" * 64,
              "started_from.param": "model.init_from"},
    )  # fmt: skip
    assert Record(run=forged, details=None).started_from is None


def test_a_record_keeps_it(make: Make) -> None:
    make(A)
    details = make(B, A).details
    assert details
    assert details.started_from
    assert Details.parse(details.as_json(), "here") == details
    before = json.loads(replace(details, started_from=None).as_json())
    del before["started_from"]
    assert Details.from_dict(before, "here").started_from is None


def test_diff_says_who_began_with_whom(make: Make, run: Run, root: Path) -> None:
    for record in (make(A), make(B, A), make(C, A)):
        assert record.details
        files = {n: file for n, file in record.details.files.items() if n != "model/key.json"}
        kept = replace(record, details=replace(record.details, files=files))
        write_record(root / ".runkey/runs.sqlite", kept)  # its key.json is no whole one
    assert "B was started from the weights of A" in run("diff", A, B)[1]
    assert "A was started from the weights of B" in run("diff", C, A)[1]
    assert f"both were started from {A[:16]}" in run("diff", B, C)[1]
    assert "started from" not in run("diff", A, A)[1]


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["witness", "evaluations", "exports"])
def test_a_record_of_numbers_that_json_lacks_is_refused(
    make: Make, where: str, number: float
) -> None:
    """Else `runkey index`, which writes it on, ends in a traceback."""
    make(A)
    details = make(B, A).details
    assert details
    stored = json.loads(details.as_json()) | {where: {"a": {"b": number}}}
    with pytest.raises(RecipeError, match="here: not a run's record"):
        Details.parse(json.dumps(stored), "here")
