"""The short form of `python -m benchmarks.training_kills`: the real stage, killed and stopped."""

import pytest

from benchmarks.training_kills import run


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
