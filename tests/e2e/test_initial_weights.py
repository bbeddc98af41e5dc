"""A run that starts from another run's key: real DVC, real trainings."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from runkey.hashing import sha256_file
from runkey.tracking.store import locate_store, open_client
from tests.support.project import Project, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_run_starts_from_a_key_and_a_wrong_one_costs_nothing(
    project: Project, tmp_path: Path
) -> None:
    first = project.json("run.json")["key"]
    weights = sha256_file(project.root / "model/weights.safetensors")
    params = project.root / "params.yaml"
    text = params.read_text()
    assert "init_from: null" in text

    params.write_text(text.replace("init_from: null", "init_from: rk2-00000000"))
    with pytest.raises(AssertionError, match="no finished run of that key is recorded here"):
        project.dvc("repro")
    assert (project.root / "prepared/train.safetensors").is_file()
    assert sha256_file(project.root / "model/weights.safetensors") == weights

    params.write_text(text.replace("init_from: null", f"init_from: {first[:12]}"))
    said = project.dvc("repro", "train")
    assert "initial weights: " in in_one_line(said)
    assert "  dropped " not in said
    keyed = project.json("model/key.json")["preimages"]["params"]["model.init_from"]
    assert keyed.startswith(f"sha256:{weights} model.json:")

    second = project.json("run.json")
    began = {"param": "model.init_from", "weights": weights, "key": first}
    assert second["started_from"] == began

    runkey(project, "get", first[:12], "--to", "got")
    params.write_text(text.replace("init_from: null", "init_from: got"))
    assert runkey(project, "key").strip() == second["key"]

    # The parent is found by the hash of the weights, so the folder counts too.
    assert "seed: 0" in params.read_text()
    params.write_text(params.read_text().replace("seed: 0", "seed: 1"))
    project.dvc("repro", "train")
    third = project.json("run.json")
    assert third["started_from"] == began
    store = locate_store(project.root)
    tags = open_client(store).get_run(third["run_id"]).data.tags
    assert (tags["started_from"], tags["started_from.weights"]) == (first, weights)
    runkey(project, "report", "--to", "page.html")
    assert f"{first[:16]} (model.init_from)" in (project.root / "page.html").read_text()

    shown = runkey(project, "show", first)
    assert f"continued by {second['key'][:16]}" in shown
    assert f"started from {first[:16]}" in runkey(project, "show", third["key"])
    lines = runkey(project, "show", third["key"], "--lineage").splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        first[:16],
        f"|- {second['key'][:16]}",
        f"`- {third['key'][:16]}",
    ]
    assert lines[2].endswith("<- this run")
    compared = runkey(project, "diff", first, third["key"])
    assert "B was started from the weights of A" in compared

    # Export and import keep it; in a store of its own the parent is missing.
    away = Project(tmp_path / "away")
    project.run("git", "clone", "-q", ".", str(away.root))
    runkey(project, "export", third["key"], str(tmp_path / "third.zip"))
    runkey(away, "import", str(tmp_path / "third.zip"))
    told = runkey(away, "show", third["key"], "--lineage")
    assert told.startswith(f"{first[:16]}: missing here; `runkey fetch {first[:16]}`")


def test_weights_that_change_in_place_are_trained_from_again(project: Project) -> None:
    """DVC sees their content through the links that the stage `check` leaves."""
    params = project.root / "params.yaml"
    text = params.read_text()
    start = project.root / "start.safetensors"
    shutil.copyfile(project.root / "model/weights.safetensors", start)
    value = re.search(r"init_from: (\S+)", text)
    assert value
    params.write_text(text.replace(value[0], "init_from: start.safetensors"))
    project.dvc("repro", "evaluate")
    first = project.json("run.json")["key"]
    assert "Data and pipelines are up to date." in project.dvc("repro", "evaluate")

    shutil.copyfile(project.root / "model/weights.safetensors", start)
    assert "`dvc repro` trains it" in in_one_line(project.summary())
    said = project.dvc("repro", "evaluate")
    assert "Running stage 'train'" in said
    assert "Running stage 'prepare'" not in said
    second = project.json("run.json")["key"]
    assert second != first
    assert "Data and pipelines are up to date." in project.dvc("repro", "evaluate")

    # The same bytes under another name are the same run.
    start.rename(project.root / "other.safetensors")
    params.write_text(text.replace(value[0], "init_from: other.safetensors"))
    shutil.rmtree(project.root / ".initial_weights")
    project.dvc("repro", "evaluate")
    assert project.json("run.json")["key"] == second


def runkey(project: Project, *words: str) -> str:
    return project.run(sys.executable, "-m", "runkey", *words).stdout
