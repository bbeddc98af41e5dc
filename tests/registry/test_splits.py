"""Runs whose AP is of test beside runs whose AP is of val: no command compares the two silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runkey.registry.diff import metrics_by_split
from runkey.registry.library import LocalLibrary
from tests.support.command_line import Run
from tests.support.records import FILES, key_of, make_run

OLD, VAL, TEST = (key_of(name) for name in ("old", "val", "test"))


@pytest.fixture
def runs(root: Path) -> Path:
    """One from before there was a split, one of val, one of test with its val beside it."""
    kept = {name: content for name, content in FILES.items() if name != "model/key.json"}
    metrics = {"eval/AP": 0.5, "class_AP/one": 0.5}
    make_run(root, OLD, name="old", metrics=metrics, files=kept)
    make_run(
        root, VAL, name="val", metrics={"eval/AP": 0.6, "class_AP/one": 0.6},
        tags={"key": VAL, "split": "val"}, started_ms=1_700_000_100_000,
    )  # fmt: skip
    metrics = {"eval/AP": 0.55, "eval/val/AP": 0.625, "val/AP": 0.62, "class_AP/one": 0.55}
    make_run(
        root, TEST, name="test", tags={"key": TEST, "split": "test"}, started_ms=1_700_000_200_000,
        files=kept, metrics=metrics,
    )  # fmt: skip
    return root


def test_list_has_a_column_as_soon_as_one_is_of_test(runs: Path, run: Run) -> None:
    _, out, _ = run("list")
    assert out.split()[3:6] == ["AP", "split", "took"]
    assert "0.550 test" in " ".join(out.split())
    assert " ".join(out.split()).count("0 val ") == 2
    assert max(map(len, out.splitlines())) <= 100
    _, out, _ = run("list", "--where", "split=val")
    assert "split" not in out.splitlines()[0]
    assert out.count("rk2-") == 2, "older runs are of val"
    _, out, _ = run("list", "--where", "split=test", "--columns", "name,AP")
    assert out.split() == ["name", "AP", "test", "0.550"]


def test_order_by_ap_says_that_the_splits_differ(runs: Path, run: Run) -> None:
    rest = "; --where split=test compares within one split"
    sorted_by = run("list", "--sort", "AP")[1]
    assert f"AP is of val in 2 runs and of test in 1 run{rest}" in sorted_by
    chosen = run("list", "--where", "AP>0.1")[1]
    assert f"AP is of test in 1 run and of val in 2 runs{rest}" in chosen
    assert "compares within" not in run("list")[1]
    assert "compares within" not in run("list", "--sort", "AP", "--where", "split=val")[1]


def test_show_names_the_split(runs: Path, run: Run) -> None:
    lines = [" ".join(line.split()) for line in run("show", TEST[:16])[1].splitlines()]
    assert "eval test AP 0.550" in lines
    assert "eval/val AP 0.625" in lines
    assert "AP by class one 0.550 (on test)" in lines
    lines = [" ".join(line.split()) for line in run("show", OLD[:16])[1].splitlines()]
    assert "eval AP 0.500" in lines
    assert "AP by class one 0.500" in lines


def test_diff_compares_val_with_val(runs: Path) -> None:
    library = LocalLibrary(runs / ".runkey")
    by_key = {record.key: record.run for record in library.matching("rk2-")}
    splits = {"val", "test"}
    assert metrics_by_split(by_key[TEST], splits) == {
        "eval/test/AP": 0.55,
        "eval/val/AP": 0.625,
        "val/AP": 0.62,
        "class_AP/test/one": 0.55,
    }
    assert metrics_by_split(by_key[OLD], splits) == {"eval/val/AP": 0.5, "class_AP/val/one": 0.5}
    assert metrics_by_split(by_key[OLD], {"val"}) == by_key[OLD].metrics


def test_diff_on_the_command_line(runs: Path, run: Run) -> None:
    answer = json.loads(run("diff", OLD[:16], TEST[:16], "--json")[1])
    by_name = {pair["name"]: pair for pair in answer["metrics"]}
    assert by_name["eval/val/AP"]["difference"] == 0.125
    assert by_name["eval/test/AP"]["difference"] is None
    assert "eval/AP" not in by_name
