"""The JSONL log: every line whole, whatever happens."""

from __future__ import annotations

import math
from pathlib import Path

from runkey.tracking.jsonl import JsonlLog, read_jsonl


def test_lines_are_on_disk_at_once_and_read_back(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "logs" / "train.jsonl", say=print)
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
    log = JsonlLog(tmp_path / "train.jsonl", say=print)
    log.log({"a": math.nan, "b": math.inf, "c": -math.inf}, step=0)
    log.close()
    (entry,) = read_jsonl(log.path)
    values = {name: float(value) for name, value in entry["values"].items()}
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


def test_after_a_crash_in_a_line_a_second_writer_begins_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "val')
    log = JsonlLog(path, say=print)
    log.log({"loss": 0.5}, 3)
    log.log({"loss": 0.5}, 4)
    log.close()
    assert [entry["step"] for entry in read_jsonl(path)] == [1, 3, 4]


def test_a_full_disk_is_said_once_and_does_not_raise() -> None:
    said: list[str] = []
    log = JsonlLog(Path("/dev/full"), say=said.append)
    for step in range(3):
        log.log({"loss": 0.5}, step)
    assert log.lost_lines == 3
    assert said == ["/dev/full: cannot be written (No space left on device); training goes on"]
    log.close()
