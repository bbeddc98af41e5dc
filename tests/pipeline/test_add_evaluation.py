"""An evaluation that is added to a finished run: all of its files, or no word of it."""

from __future__ import annotations

import json
import shutil

import pytest

from runkey.params import parse_params
from runkey.pipeline.record import FinishedRun
from runkey.tracking.mlflow_run import TrackedRun
from tests.support.project import TINY
from tests.support.recorded_checkout import Checkout, checkout, made

__all__ = ["checkout", "made"]


def test_files_that_are_removed_meanwhile_are_recorded_all_the_same(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second DVC does, which removes the stage's outputs when the first was killed."""
    folder = checkout.root / "evaluation"
    close = TrackedRun.close

    def removing(self: TrackedRun) -> str | None:
        shutil.rmtree(folder)
        return close(self)

    monkeypatch.setattr(TrackedRun, "close", removing)
    folder.chmod(0o755)
    (folder / "new.json").write_text("{}")
    FinishedRun(parse_params(TINY), checkout.root).add_evaluation(
        "rk2-f", {"eval/AP": 0.75}, "test"
    )
    assert (checkout.artifacts / "evaluation/new.json").read_text() == "{}"
    assert checkout.details.evaluations["rk2-f"] == {"eval/AP": 0.75}
    stored = json.loads((checkout.artifacts / "record.json").read_text())
    assert "evaluation/new.json" in stored["files"]
    assert checkout.record.run.split == "test"


def test_files_that_are_gone_before_are_no_evaluation(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FinishedRun(parse_params(TINY), checkout.root)
    (checkout.root / "evaluation/new.json").write_text("{}")
    copyfile = shutil.copyfile

    def removing(source, target):
        source.unlink()
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", removing)
    with pytest.raises(FileNotFoundError):
        run.add_evaluation("rk2-f", {"eval/AP": 0.75}, "test")
    assert "rk2-f" not in checkout.details.evaluations


def test_what_mlflow_does_not_take_is_sent_by_the_stage_again(
    checkout: Checkout, caplog: pytest.LogCaptureFixture
) -> None:
    there = checkout.artifacts / "evaluation"
    kept = there.rename(there.with_name("aside"))
    there.write_text("in the way of a folder")
    FinishedRun(parse_params(TINY), checkout.root).add_evaluation(
        "rk2-f", {"eval/AP": 0.75}, "test"
    )
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said[0].endswith("; the work goes on, tried again")
    assert "lacks " in said[1]
    assert said[2:] == ["MLflow: `dvc repro -f -s evaluate` sends it, when MLflow answers again"]
    assert "rk2-f" not in checkout.details.evaluations

    there.unlink()
    kept.rename(there)
    caplog.clear()
    FinishedRun(parse_params(TINY), checkout.root).add_evaluation(
        "rk2-f", {"eval/AP": 0.75}, "test"
    )
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
    assert checkout.details.evaluations["rk2-f"] == {"eval/AP": 0.75}
