"""Two machines in effect: own caches, own MLflow stores; one git remote, DVC remote and server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.clones import Team, runkey
from tests.support.project import Project, clean_environment, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def timed_repro(project: Project) -> str:
    """`dvc repro`; what it printed, its seconds told to whoever reads the test's output."""
    start = time.monotonic()
    printed = project.dvc("repro")
    sys.stdout.write(f"dvc repro in {project.root.name}: {time.monotonic() - start:.1f} s\n")
    return printed


def same_results(one: Project, other: Project) -> None:
    for path in ("run.json", "metrics/train.json", "model/weights.safetensors", "model/key.json"):
        assert (one.root / path).read_bytes() == (other.root / path).read_bytes(), path


def test_publish_says_what_it_sent_and_sends_it_once(team: Team) -> None:
    assert "published\n" in team.published
    assert re.search(r"DVC +\d\d objects \(\d+\.\d MB\), 5 stages; \d\d sent to ", team.published)
    again = runkey(team.first, "publish", team.key)
    assert "published already" in again
    assert "all were there" in again
    listed = subprocess.run(
        ["git", "ls-remote", str(team.folder / "remote.git"), f"refs/runkey/{team.key}/*"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert len(listed) == 1


def test_a_fetched_key_is_restored_and_no_stage_runs(team: Team) -> None:
    second = team.clone("second")
    start = time.monotonic()
    fetched = runkey(second, "fetch", team.key[:12], "--json")
    sys.stdout.write(f"runkey fetch: {time.monotonic() - start:.1f} s\n")
    assert json.loads(fetched)["state"] == "new"
    printed = timed_repro(second)
    assert re.findall(r"Running stage '(\w+)'", printed) == ["check"]
    assert printed.count("is cached - skipping run") == 5
    same_results(team.first, second)
    same = ("metrics/evaluate.json", "evaluation/metrics.json")
    assert all(second.json(path) == team.first.json(path) for path in same)
    (record,) = json.loads(runkey(second, "list", "--json", "--limit", "5"))
    assert team.key in json.dumps(record)
    # Handed on from here it is still the first one's run.
    assert "published already" in runkey(second, "publish", team.key)
    assert json.loads(runkey(second, "fetch", team.key, "--json"))["state"] == "already there"


def test_without_fetch_train_takes_the_result_from_the_server(team: Team) -> None:
    third = team.clone("third")
    printed = timed_repro(third)
    assert "model/ is written" not in printed
    same_results(team.first, third)


def test_an_archive_does_the_same_without_a_server(team: Team, tmp_path: Path) -> None:
    archive = tmp_path / "run.zip"
    runkey(team.first, "export", team.key, str(archive))
    fourth = team.clone("fourth")
    start = time.monotonic()
    taken = json.loads(runkey(fourth, "import", str(archive), "--json"))
    sys.stdout.write(f"runkey import: {time.monotonic() - start:.1f} s\n")
    assert taken["is_new"]
    assert re.findall(r"Running stage '(\w+)'", timed_repro(fourth)) == ["check"]
    same_results(team.first, fourth)


BY_HAND = ("-m", "stages.train")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *BY_HAND)


@pytest.mark.parametrize("command", [BY_HAND, TORCHRUN], ids=["by hand", "torchrun"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "after dvc repro"])
def test_what_dvc_did_not_start_is_published_and_fetched(
    team: Team, command: tuple[str, ...], at_once: bool
) -> None:
    name = f"{len(command)}-{at_once}"
    maker, taker = team.clone(f"maker-{name}"), team.clone(f"taker-{name}")
    for project in (maker, taker):
        params = project.root / "params.yaml"
        seed = 100 + 2 * len(command) + at_once
        params.write_text(params.read_text().replace("seed: 0", f"seed: {seed}", 1))
    maker.dvc("repro", "profile_memory")
    maker.run(sys.executable, *command)
    key = maker.json("run.json")["key"]
    if not at_once:
        (maker.root / "model/weights.safetensors").unlink()
        assert "is reused" in maker.dvc("repro", "train")
    assert "published\n" in runkey(maker, "publish", key)
    assert json.loads(runkey(taker, "fetch", key, "--json"))["state"] == "new"
    printed = taker.dvc("repro", "train")
    assert "Running stage 'train'" not in printed
    same_results(maker, taker)


def test_what_is_gone_from_the_checkout_is_named(team: Team) -> None:
    maker = team.clone("maker-gone")
    params = maker.root / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 99", 1))
    maker.dvc("repro", "profile_memory")
    maker.run(sys.executable, *BY_HAND)
    key = maker.json("run.json")["key"]
    (maker.root / "model/weights.safetensors").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "runkey", "publish", key],
        cwd=maker.root,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = in_one_line(done.stderr)
    assert "has no entry of this run; `dvc repro` where the tree has this key takes the run" in said
