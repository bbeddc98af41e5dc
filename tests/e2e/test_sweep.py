"""`runkey sweep` with real trials: a killed driver, and two clones with overlapping sweeps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from runkey.identity.record import RESUMED_AFTER
from runkey.paths import TRAIN_LOG
from tests.support.points import read_jsonl
from tests.support.project import TINY, Project, begin_project, clean_environment, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
SWEEP = (sys.executable, "-m", "runkey", "sweep", "--json")
SHORT = ("-S", "training.epochs=1")


def begin_sweep(
    project: Project, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a sweep; its lines come on stderr, and at its end its answer on stdout."""
    return subprocess.Popen(
        [*SWEEP, *arguments],
        cwd=project.root,
        env=clean_environment() | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(sweep: subprocess.Popen[str]) -> dict[str, Any]:
    out, said = sweep.communicate()
    assert sweep.returncode == 0, said
    answer: dict[str, Any] = json.loads(out)
    return answer


def finished_runs(
    project: Project, keys: list[str], env: Mapping[str, str] | None = None
) -> dict[str, int]:
    """The number of finished runs of each key in the store."""
    command = (sys.executable, "-m", "runkey", "list", "--json", "--limit", "1000")
    runs = json.loads(project.run(*command, env=env).stdout)
    done = [one["key"] for one in runs if one["run"]["status"] == "FINISHED"]
    return {key: done.count(key) for key in keys}


def test_a_killed_driver_started_again_trains_each_key_once(project: Project) -> None:
    line = (*SHORT, "-S", "seed=11,12,13,14")
    first = begin_sweep(project, *line)
    assert first.stderr
    for said in first.stderr:
        if "finished, AP" in said:
            break
    else:
        pytest.fail("it ended before a trial was finished")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    again = begin_sweep(project, *line)
    assert again.stderr
    head = again.stderr.readline()
    assert head.startswith("4 points: 1 finished"), head
    answer = result(again)
    assert [one["state"] for one in answer["points"]] == ["finished"] * 4
    keys = [one["key"] for one in answer["points"]]
    assert finished_runs(project, keys) == dict.fromkeys(keys, 1)
    assert answer["best"] in keys
    folder = Path(answer["folder"])
    assert {"sweep.json", "table.csv", "parallel.png"} <= {one.name for one in folder.iterdir()}
    third = begin_sweep(project, *line)
    assert third.stderr
    assert third.stderr.readline() == "4 points: 4 finished\n"
    assert result(third)["sweep"] == answer["sweep"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["Ctrl-C", "closed"])
def test_a_stopped_sweep_ends_its_trials_and_goes_on(
    project: Project, number: signal.Signals
) -> None:
    line = ("-S", "training.epochs=20", "-S", f"seed={20 + number},{40 + number}")
    home = project.root / ".runkey"
    known = set(home.glob("rk2-*"))
    first = begin_sweep(project, *line)
    wait_for(lambda: trained_steps(set(home.glob("rk2-*")) - known), "a training", 900)
    first.send_signal(number)
    out, said = first.communicate(timeout=300)
    steps = trained_steps(set(home.glob("rk2-*")) - known)
    assert (first.returncode, out) == (128 + number, ""), said
    last = said.splitlines()[-2:]
    assert re.fullmatch(r"ending [12] trials?; a training writes a checkpoint", last[0]), said
    assert last[1] == f"stopped by {number.name}; the same command goes on"
    assert "Traceback" not in said
    assert not [one for one in psutil.process_iter(["cwd"]) if is_in(project.root, one)]
    answer = result(begin_sweep(project, *line))
    assert [one["state"] for one in answer["points"]] == ["finished"] * 2
    listed = project.run(sys.executable, "-m", "runkey", "list", "--json", "--limit", "1000")
    tags = {one["key"]: one["run"]["tags"] for one in json.loads(listed.stdout)}
    for key, step in steps.items():
        after = re.search(r"step (\d+)", tags[key][RESUMED_AFTER])
        assert after
        assert int(after[1]) >= step > 0


def trained_steps(folders: Collection[Path]) -> dict[str, int]:
    """The last logged step of each training, by key."""
    found: dict[str, int] = {}
    for log in (folder / TRAIN_LOG.name for folder in folders):
        if log.exists():
            steps = [one["step"] for one in read_jsonl(log) if "values" in one and "step" in one]
            found |= {log.parent.name: max(steps)} if steps else {}
    return found


def is_in(folder: Path, process: psutil.Process) -> bool:
    """Whether a process works in a folder, or below it."""
    return Path(process.info["cwd"] or "/").is_relative_to(folder)


def test_what_fits_nowhere_is_not_started_and_names_the_way_out(project: Project) -> None:
    printed = project.run(*SWEEP, *SHORT, "-S", "memory.budget_gib=0.3,8", "--dry-run").stderr
    head, small, large = printed.splitlines()
    assert head.startswith("2 points: 1 that cannot run, 1 to train")
    assert "failed: memory.budget_gib: a training step of one image takes up to" in small
    assert "it fit" in small or "use a smaller model" in small
    assert large.endswith("to train")


def test_overlapping_sweeps_of_two_clones_train_each_key_once(address: str, tmp_path: Path) -> None:
    first = begin_project(tmp_path / "first", TINY)
    remote = str(tmp_path / "remote.git")
    first.run("git", "init", "-q", "--bare", remote)
    first.run("git", "remote", "add", "origin", remote)
    first.dvc("remote", "modify", "store", "url", str(tmp_path / "store"))
    first.run("git", "commit", "-q", "-a", "-m", "remotes")
    first.run("git", "push", "-q", "origin", "HEAD")
    first.dvc("push", "data.dvc")
    second = Project(tmp_path / "second")
    subprocess.run(["git", "clone", "-q", remote, str(second.root)], check=True)
    server = {"MLFLOW_TRACKING_URI": address}
    one = begin_sweep(first, *SHORT, "-S", "seed=1,2,3", env=server)
    other = begin_sweep(second, *SHORT, "-S", "seed=3,2,4", env=server)
    answers = [result(sweep) for sweep in (one, other)]
    points = [point for answer in answers for point in answer["points"]]
    assert [point["state"] for point in points] == ["finished"] * 6
    keys = sorted({point["key"] for point in points})
    assert len(keys) == 4
    assert finished_runs(first, keys, server) == dict.fromkeys(keys, 1)
    # Published: whichever clone trained it.
    listed = first.run("git", "ls-remote", "origin", "refs/runkey/*").stdout
    assert all(key in listed for key in keys)
