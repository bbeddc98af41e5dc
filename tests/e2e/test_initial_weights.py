"""A run that starts from another run's key: real DVC, real trainings."""

from __future__ import annotations

import re
import shutil
import sys

import pytest

from runkey.hashing import sha256_file
from tests.support.project import Project, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_run_starts_from_a_key_and_a_wrong_one_costs_nothing(project: Project) -> None:
    first = project.json("run.json")["key"]
    weights = sha256_file(project.root / "model/weights.safetensors")
    params = project.root / "params.yaml"
    text = params.read_text()
    assert "init_from: null" in text

    params.write_text(text.replace("init_from: null", "init_from: rk2-00000000"))
    with pytest.raises(AssertionError, match="no finished run of that key is recorded here"):
        project.dvc("repro")
    assert (project.root / "prepared/train.json").is_file()
    assert sha256_file(project.root / "model/weights.safetensors") == weights

    params.write_text(text.replace("init_from: null", f"init_from: {first[:12]}"))
    said = project.dvc("repro", "train")
    assert "initial weights: " in in_one_line(said)
    assert "  dropped " not in said
    keyed = project.json("model/key.json")["preimages"]["params"]["model.init_from"]
    assert keyed.startswith(f"sha256:{weights} model.json:")

    project.run(sys.executable, "-m", "runkey", "get", first[:12], "--to", "got")
    params.write_text(text.replace("init_from: null", "init_from: got"))
    done = project.run(sys.executable, "-m", "runkey", "key")
    assert done.stdout.strip() == project.json("run.json")["key"]


def test_weights_that_change_in_place_are_trained_from_again(project: Project) -> None:
    """DVC sees the name of the file; the stage `check` leaves a link to it as its output."""
    params = project.root / "params.yaml"
    text = params.read_text()
    start = project.root / "start.safetensors"
    shutil.copyfile(project.root / "model/weights.safetensors", start)
    value = re.search(r"init_from: (\S+)", text)
    assert value
    params.write_text(text.replace(value[0], "init_from: start.safetensors"))
    project.dvc("repro")
    first = project.json("run.json")["key"]
    assert "Data and pipelines are up to date." in project.dvc("repro")

    shutil.copyfile(project.root / "model/weights.safetensors", start)
    with pytest.raises(AssertionError, match="changed since model/ was") as refused:
        project.dvc("repro")
    assert "`dvc repro -f -s train` trains again" in in_one_line(str(refused.value))
    assert project.json("run.json")["key"] == first
    project.dvc("repro", "-f", "-s", "train")
    assert "Running stage 'evaluate'" in project.dvc("repro")
    assert project.json("run.json")["key"] != first
    assert "Data and pipelines are up to date." in project.dvc("repro")
