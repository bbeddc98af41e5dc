"""The short forms of `python -m benchmarks.kills` and `training_kills`: real stages, killed."""

import pytest

from benchmarks import kills
from benchmarks.training_kills import run
from tests.support.kill_commands import CASES


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_stage_ends_as_if_undisturbed(tmp_path):
    (row,) = kills.run(tmp_path, [case for case in CASES if case.name == "prepare"], 2, seed=1)
    assert [fault for played in row.rounds for fault in played.faults] == []
    assert sum(played.kills.total() for played in row.rounds) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_training_is_the_one_that_nobody_killed(tmp_path):
    lines = []
    result = run(tmp_path, kills=3, terms=1, workers=(0, 2), epochs=4, say=lines.append)
    assert result["faults"] == []
    assert result["SIGKILL"] >= 3  # more if one came too late for a file half written
    assert result["SIGTERM"] == 1
    assert result["killed while writing"] >= 1
    compared = {"model", "ema", "optimizer", "state", "best weights", "log"}
    compared |= {"model/weights.safetensors", "steps.csv", "epochs.csv"}
    assert compared <= set(result["compared"])
