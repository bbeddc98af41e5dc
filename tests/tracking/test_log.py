"""The JSONL log: every line whole and once, whatever happens."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runkey.tracking import log as log_module
from runkey.tracking.log import JsonlLog
from tests.support.mlflow_store import fill
from tests.support.points import read_jsonl


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_jsonl(path) if "step" in entry]


def test_lines_are_on_disk_at_once_and_read_back(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "home" / "train.jsonl")
    log.log({"train/loss": 1.5, "train/epoch": 0}, step=10)
    log.event("early_stop", epoch=3, folder=tmp_path)
    first, second = read_jsonl(log.path)  # not closed yet: a crash now would lose nothing
    assert first["step"] == 10
    assert first["values"] == {"train/loss": 1.5, "train/epoch": 0}
    assert (second["event"], second["fields"]) == (
        "early_stop",
        {"epoch": 3, "folder": str(tmp_path)},
    )
    assert first["time"] <= second["time"]
    log.close()


def test_values_that_json_lacks_are_kept(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "train.jsonl")
    log.log({"a": math.nan, "b": math.inf, "c": -math.inf}, step=0)
    log.close()
    (entry,) = read_jsonl(log.path)
    values = {name: float(value) for name, value in entry["values"].items()}
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "torn",
    ['{"step": 2, "val', "{" + " " * 200_000, "\0" * 70_000],
    ids=["half", "long", "zeros"],
)
def test_a_line_that_a_crash_cut_short_goes(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1, "time": 1.5, "values": {"loss": 2.0}}\n' + torn)
    log = JsonlLog(path)
    log.log({"loss": 0.5}, 3)
    log.close()
    assert steps(path) == [1, 3]
    assert len(path.read_bytes().splitlines()) == 2


def test_steps_that_are_trained_again_are_not_logged_twice(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "train.jsonl"
    first = JsonlLog(path)
    first.event("training_start", device="cpu")
    for step in range(1, 8):
        first.log({"train/loss": math.nan if step == 5 else 1 / step, "train/lr": 0.1}, step)
        if step == 4:
            position = json.loads(json.dumps(first.position()))
        if step in (3, 6):
            first.event("skipped_step", step=step, image_ids=(1, 2))
    first.log({"train/epoch_loss": 0.5, "val/AP": 0.1}, 7)  # an epoch ends at a logged step
    before = path.read_bytes()  # killed here

    second = JsonlLog(path)
    second.resume(position)
    for step in range(5, 8):
        second.log({"train/loss": math.nan if step == 5 else 1 / step, "train/lr": 0.1}, step)
        if step == 6:
            second.event("skipped_step", step=step, image_ids=[1, 2])
    second.log({"train/epoch_loss": 0.5, "val/AP": 0.1}, 7)
    assert path.read_bytes() == before
    second.log({"train/loss": 1 / 8, "train/lr": 0.1}, 8)
    second.event("skipped_step", step=8, image_ids=[1, 2])
    second.close()
    assert path.read_bytes().startswith(before)
    assert len(path.read_bytes()[len(before) :].splitlines()) == 2
    assert said == []


def test_interrupted_again_before_it_is_where_it_was(tmp_path: Path, said: list[str]) -> None:
    """A checkpoint that is taken on the way there knows what is still to come again."""
    path = tmp_path / "train.jsonl"

    def train(position: Any, steps: range, checkpoint: int) -> dict[str, int | str]:
        log = JsonlLog(path)
        log.resume(position)
        for step in steps:
            log.log({"train/loss": 1 / step}, step)
            if step % 2 == 0:
                log.event("loss_spike", step=step)
            if step == checkpoint:
                position = json.loads(json.dumps(log.position()))
        log.close()
        return position

    position = train(None, range(1, 10), checkpoint=2)
    position = train(position, range(3, 7), checkpoint=5)
    position = train(position, range(6, 8), checkpoint=7)
    train(position, range(8, 13), checkpoint=12)
    assert steps(path) == list(range(1, 13))
    assert path.read_text().count("loss_spike") == 6
    assert said == []


def test_what_does_not_come_again_holds_no_checkpoint_back(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "train.jsonl"
    log = JsonlLog(path)
    start = log.position()
    for step in range(1, 7):
        log.log({"loss": 1.0}, step)
    log.event("hint.loader", step=2, seen="slow")
    again = JsonlLog(path)
    again.resume(start)
    assert again.position()["log_bytes"] == 0
    for step in (3, 6):  # runtime.log_every is 3 now, and the loader is fast
        again.log({"loss": 1.0}, step)
    assert again.position()["log_bytes"] == path.stat().st_size
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_without_a_checkpoint_the_whole_log_is_expected(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "train.jsonl"
    for _ in range(3):
        log = JsonlLog(path)
        log.resume(None)
        for step in range(4):
            log.log({"train/loss": 1.0, "train/images_per_second": os.urandom(2)[0]}, step)
        log.close()
    assert steps(path) == [0, 1, 2, 3]
    assert said == []  # the pace of a machine is not a result


def test_other_values_are_said_and_the_first_stay(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "train.jsonl"
    for value in (1.0, 2.0):
        log = JsonlLog(path)
        log.resume(None)
        for step in range(3):
            log.log({"train/loss": 0.5 if step == 1 else value, "train/lr": 1}, step)
        log.close()
    assert [entry["values"]["train/loss"] for entry in read_jsonl(path)] == [1.0, 0.5, 1.0]
    assert said == [
        f"{path}: training again came to other values in 2 steps (the first is step 0);"
        " the log has the earlier ones"
    ]


@pytest.mark.parametrize("damage", ["cut", "zeroed in the middle"])
def test_a_log_that_lost_lines_is_said(tmp_path: Path, said: list[str], damage: str) -> None:
    path = tmp_path / "train.jsonl"
    log = JsonlLog(path)
    for step in range(5):
        log.log({"loss": 1.0}, step)
    position = log.position()
    log.close()
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        lines[2] = bytes(len(lines[2]))
        path.write_bytes(b"".join(lines))
    log = JsonlLog(path)
    log.resume(position)
    log.log({"loss": 1.0}, 5)
    assert log.lost_lines == 1
    assert log.position()["log_lost_lines"] == 1
    log.close()
    assert steps(path) == ([0, 1, 5] if damage == "cut" else [0, 1, 4, 5])
    first, last = said
    assert "that the checkpoint knows of, gone or damaged; the log lacks the values" in first
    assert last == f"{path}: lacks 1 line"


def test_people_find_it_in_the_workspace(tmp_path: Path, said: list[str]) -> None:
    live, shown = tmp_path / "home" / "train.jsonl", tmp_path / "logs" / "train.jsonl"
    log = JsonlLog(live, shown)
    log.log({"loss": 1.0}, 1)
    assert shown.samefile(live)  # killed here; DVC may commit what it finds, and protect it
    again = JsonlLog(live, shown)
    assert shown.samefile(live)
    again.log({"loss": 1.0}, 2)
    again.finish()
    assert not shown.samefile(live)
    assert (steps(shown), said) == ([1, 2], [])
    cached = tmp_path / "cached"
    os.link(live, cached)
    third = JsonlLog(live, shown)
    third.log({"loss": 1.0}, 3)
    assert (steps(cached), steps(shown)) == ([1, 2], [1, 2, 3])
    third.close()


def test_a_full_disk_is_said_once_and_lines_are_written_later(
    small_disk: Path, tmp_path: Path, said: list[str]
) -> None:
    path, shown = small_disk / "train.jsonl", tmp_path / "logs" / "train.jsonl"
    log = JsonlLog(path, shown)
    assert said == [f"{shown}: comes at the end (Invalid cross-device link); follow {path}"]
    log.log({"loss": 1.0}, 0)
    filler = fill(small_disk)
    for step in range(1, 200):
        log.log({"loss": 1.0}, step)
    assert log.lost_lines > 100
    assert steps(path) == list(range(200 - log.lost_lines))
    assert path.read_bytes().endswith(b"\n")  # what a full disk took of a line went again
    assert said[1:] == [
        f"{path}: cannot be written (No space left on device); training goes on, lines are kept"
        " and written when there is room"
    ]
    filler.unlink()
    log.log({"loss": 1.0}, 200)
    log.finish()
    assert said[2:] == [f"{path}: written again; nothing is missing"]
    assert steps(shown) == steps(path) == list(range(201))


def test_what_a_disk_that_stays_full_lacks_is_named(
    small_disk: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_MAX_WAITING_BYTES", 1000)
    path = small_disk / "train.jsonl"
    log = JsonlLog(path)
    log.log({"loss": 1.0}, 0)
    position = log.position()
    fill(small_disk)
    for step in range(1, 301):
        log.log({"loss": 1.0}, step)
    written = steps(path)
    log.close()
    assert said[1:] == [f"{path}: lacks {300 - written[-1]} lines (steps {written[-1] + 1} to 300)"]
    assert (position["log_lost_lines"], log.position()["log_lost_lines"]) == (0, log.lost_lines)


def test_a_read_only_home_leaves_the_log_in_the_workspace(
    small_disk: Path, tmp_path: Path, said: list[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    place, shown = small_disk / "key" / "train.jsonl", tmp_path / "logs" / "train.jsonl"
    log = JsonlLog(place, shown)
    log.log({"loss": 1.0}, 1)
    log.finish()
    assert steps(shown) == [1]
    assert said == [f"{place}: cannot be written (Read-only file system); the log is {shown} alone"]
