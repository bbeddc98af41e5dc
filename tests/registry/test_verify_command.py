"""`runkey verify` as a command: what it prints, and its exit codes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing

import pytest

from runkey.cli import main
from tests.support.recorded_checkout import Checkout

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    (checkout.root / "params.yaml").touch()

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["runkey", "verify", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


def test_a_right_run(checkout: Checkout, call: Call) -> None:
    code, out, _ = call(checkout.record.key[4:10])
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{checkout.record.label}  baseline  (run ")
    assert [line.split()[0] for line in lines[1:7]] == ["ok"] * 6
    # This checkout's files have no key: its stages are no modules.
    assert lines[7].startswith(
        f"  warning  workspace    run.json is of {checkout.record.label}; the"
    )
    assert lines[-1] == "no faults, 1 warning"


def test_a_damaged_run_is_a_no(checkout: Checkout, call: Call) -> None:
    (checkout.artifacts / "model/weights.pt").write_bytes(b"damaged")
    code, out, _ = call(checkout.record.key)
    assert code == 3
    assert "FAULT files model/weights.pt: 7 bytes, recorded 200 (run " in " ".join(out.split())
    assert out.splitlines()[-1] == "1 fault, 1 warning"
    code, out, _ = call(checkout.record.key, "--json")
    assert code == 3
    assert json.loads(out)["right"] is False


def test_all_runs_have_a_line(checkout: Checkout, call: Call) -> None:
    code, out, _ = call("--all", "--quick")
    assert code == 0
    assert out.splitlines()[0].split()[:2] == [
        "ok",
        f"{checkout.record.label}:{checkout.record.run.run_id[:8]}",
    ]
    assert out.splitlines()[-1].endswith("/.runkey/runs.sqlite: no faults, 1 warning")
    (checkout.artifacts / "run.json").unlink()
    code, out, _ = call("--all", "--quick")
    assert code == 3
    assert out.startswith("  FAULT    ")
    assert "run.json: " in out


def test_a_record_that_is_gone_or_torn_is_named(checkout: Checkout, call: Call) -> None:
    run_id = checkout.record.run.run_id
    path = checkout.records
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE runs SET details = '{'")
    code, out, _ = call("--all")
    assert code == 3
    assert str(path) in out
    assert f"run {run_id}: its record is damaged" in " ".join(out.split())
    path.unlink()
    code, out, _ = call("--all")
    assert code == 3
    assert f"1 finished run of MLflow without a record here: {run_id}" in " ".join(out.split())
    assert "`runkey index`" in out
    code, out, _ = call("--all", "--json")
    assert json.loads(out)["right"] is False
    code, _, error = call("abcdef")
    assert code == 1
    assert error.startswith("error: ")


def test_everything_gone_and_nothing_crashes(checkout: Checkout, call: Call) -> None:
    shutil.rmtree(checkout.root / "mlartifacts")
    shutil.rmtree(checkout.root / ".dvc")
    shutil.rmtree(checkout.root / ".git")
    with closing(sqlite3.connect(checkout.root / "mlflow.db")) as database, database:
        database.execute("DROP TABLE latest_metrics")
    code, out, _ = call(checkout.record.key)
    assert code == 3
    faults = [line.split()[1] for line in out.splitlines() if line.startswith("  FAULT")]
    assert faults == ["files", "files", "key", "mlflow", "dvc"]


@pytest.mark.parametrize("arguments", [(), ("abcdef", "--all")])
def test_a_key_or_all(call: Call, arguments: tuple[str, ...]) -> None:
    code, _, error = call(*arguments)
    assert code == 2
    assert "--all" in error
