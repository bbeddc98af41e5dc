"""Whole trainings on two ranks: the same on both, killed and gone on with, ended together."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from runkey.errors import TRY_ELSEWHERE
from runkey.training.distributed import World
from tests.support import rank_trainings
from tests.support.rank_trainings import STEPS
from tests.support.start_ranks import command

pytestmark = pytest.mark.slow

GOES_ON = "`dvc repro` goes on from there"


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, whatever is nested."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture(scope="module")
def whole(results, tmp_path_factory) -> list[Any]:
    """Each rank's results of a training that nothing happens to."""
    return results("train", str(tmp_path_factory.mktemp("whole")))


def test_all_ranks_train_the_same_model_and_one_logs(whole):
    first, second = whole
    assert same(first["best"], second["best"])
    assert same(first["history"], second["history"])
    assert [step for step, values in first["logged"] if "train/loss" in values] == [*range(1, 10)]
    assert second["logged"] == []
    assert first["parts"].keys() >= {"model", "ema", "optimizer"}


def test_two_ranks_learn_what_one_does(whole, tmp_path):
    """But for rounding, the noise of dropout and batch norm's statistics, which are a rank's."""
    alone = rank_trainings.train(World(), str(tmp_path))
    losses = [[e["train/epoch_loss"] for e in result["history"]] for result in (alone, whole[0])]
    assert losses[1] == pytest.approx(losses[0], rel=0.15)
    assert losses[1][-1] < 0.9 * losses[1][0]


def gone_on_with(train, folder: Path) -> Any:
    ended = train()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert f"of {STEPS}" in ended[0][2]
    assert "resuming after step" in ended[0][2]
    return torch.load(folder / "out-0.pt")


def resumed_exactly(train, folder: Path, whole: list[Any]) -> None:
    again = gone_on_with(train, folder)
    for kind in ("best", "history", "parts"):
        assert same(again[kind], whole[0][kind]), kind
    logged = again["logged"]  # since the restart
    assert logged
    assert same(logged, whole[0]["logged"][-len(logged) :])


@pytest.mark.parametrize("act", ["killed in a step", "killed in backward"])
def test_a_killed_rank_ends_all_and_a_restart_resumes_exactly(train, tmp_path, whole, act):
    began = time.monotonic()
    (code, _, said), (killed, _, _) = train(act, "1", "3")
    assert killed == -9
    assert code == TRY_ELSEWHERE
    line = said.splitlines()[-1]
    assert line.startswith("error: rank 1 (process ")
    assert "ended while training; training ends on all ranks; stopped after step " in line
    assert line.endswith(f" of {STEPS}; {GOES_ON}")
    assert "Traceback" not in said
    assert time.monotonic() - began < 100
    resumed_exactly(train, tmp_path, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_suspended_rank_ends_the_other_and_a_restart_resumes_exactly(
    start, train, tmp_path, whole, rank
):
    """Its connections stay open: gloo would wait for it for ever."""
    arguments = (str(tmp_path / "checkpoints"), "SIGSTOP", str(rank), "5")
    ranks = start(command("train", tmp_path, *arguments), SILENT_SECONDS="10")
    _, said = ranks.processes[1 - rank].communicate(timeout=200)
    assert ranks.processes[1 - rank].returncode == TRY_ELSEWHERE
    line = said.splitlines()[-1]
    assert line.startswith(f"error: rank {rank} (process {ranks.processes[rank].pid} on ")
    assert f" s (suspended, swapping or cut off: look at {socket.gethostname()}); training" in line
    ranks.processes[rank].send_signal(signal.SIGCONT)
    _, said = ranks.processes[rank].communicate(timeout=200)
    assert said.splitlines()[-1].startswith(
        f"error: the others ended without this rank: rank {rank} (process "
    )
    resumed_exactly(train, tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 9])
def test_rank_0_killed(train, tmp_path, whole, step):
    (killed, _, _), (code, _, said) = train("SIGKILL", "0", str(step))
    assert (killed, code) == (-9, TRY_ELSEWHERE)
    line = said.splitlines()[-1]
    assert line.startswith("error: rank 0 (process ")
    assert line.endswith("`dvc repro` goes on from rank 0's newest checkpoint")
    assert "Traceback" not in said
    if step > 1:
        resumed_exactly(train, tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_one_rank_stops_all_at_one_step(train, tmp_path, whole, rank):
    ended = train("SIGTERM", rank, "5")
    assert [code for code, _, _ in ended] == [143, 143]
    lines = [said.splitlines()[-1] for _, _, said in ended]
    assert lines[0] == f"stopped by SIGTERM after step 4 of {STEPS}; {GOES_ON}"
    assert lines[1].startswith(f"stopped by SIGTERM after step 4 of {STEPS}; ")
    resumed_exactly(train, tmp_path, whole)


@pytest.mark.slow
def test_an_image_that_one_rank_cannot_read_ends_all(train, tmp_path, whole):
    ended = train("unreadable", "1", "5")
    assert [code for code, _, _ in ended] == [1, 1]
    line = ended[0][2].splitlines()[-1]
    assert line == (
        "error: rank 1 of 2: data/7.png: cannot be read; stopped after step 4 of"
        f" {STEPS}; {GOES_ON}"
    )
    resumed_exactly(train, tmp_path, whole)


def test_ranks_skip_and_go_back_together(results, tmp_path):
    """Rank 1's loss alone is not finite in steps 4 and 5: that is known after step 6."""
    folder = tmp_path / "checkpoints"
    first, second = results("train", str(folder), "poisoned", "1", "4")
    assert [kind for kind in first["events"] if kind in ("skipped_step", "rollback")] == [
        "skipped_step",
        "skipped_step",
        "rollback",
    ]
    assert second["events"] == []
    assert same(first["best"], second["best"])
    assert same(first["history"], second["history"])
    assert [path.name for path in folder.glob("*.json")] == ["bad-step-4.json"]
