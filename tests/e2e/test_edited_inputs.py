"""Stages that are started one by one, on files that changed: nothing wrong is kept, by real DVC."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from runkey.identity.key import make_recipe
from runkey.params import load_params, parse_params
from tests.support.project import Project, clean_environment, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LABELS = "data/annotations/instances_train.json"


def refused(project: Project, *arguments: str) -> str:
    """Run DVC, which fails, and notes nothing; return the line of the stage."""
    before = (project.root / "dvc.lock").read_bytes()
    command = [str(Path(sys.executable).with_name("dvc")), *arguments]
    done = subprocess.run(
        command,
        cwd=project.root,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert (project.root / "dvc.lock").read_bytes() == before
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_edited_data_and_single_stages(project: Project) -> None:
    first = project.json("run.json")["key"]
    labels = project.root / LABELS
    text = labels.read_text()
    labels.write_text(text.replace('"category_id": 3', '"category_id": 7'))
    told = f"{LABELS}: not what data.dvc says"
    assert refused(project, "repro", "-s", "train").startswith(told)
    assert refused(project, "repro", "--downstream", "prepare").startswith(told)
    project.dvc("checkout", "--force", "prepared", "model", "run.json")
    assert refused(project, "repro", "-s", "evaluate", "--force").startswith(told)
    project.dvc("add", "data")
    told = "prepared/: made from other data than there are now"
    assert refused(project, "repro", "-s", "train").startswith(told)
    project.dvc("repro")
    second = project.json("run.json")["key"]
    assert second == make_recipe("train", project.root).key != first
    # What the tree was before is reused, not trained again.
    labels.write_text(text)
    project.dvc("add", "data")
    project.dvc("repro")
    assert project.json("run.json")["key"] == first


def test_other_parameters_and_a_model_that_is_another(project: Project) -> None:
    params = project.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("\n  split_seed: 0", "\n  split_seed: 1"))
    line = refused(project, "repro", "-s", "evaluate", "--force")
    assert line.startswith("prepared/: made from other params than there are now")
    params.write_text(re.sub(r"\nlr: \S+", "\nlr: 0.002", text))
    line = refused(project, "repro", "-s", "evaluate", "--force")
    assert line.startswith("run.json is of rk2-")
    params.write_text(text)
    with (project.root / "model/weights.safetensors").open("ab") as weights:
        weights.write(b"x")
    line = refused(project, "repro", "-s", "evaluate", "--force")
    assert line.startswith("model/weights.safetensors: not what run ")
    project.dvc("checkout", "--force", "model")
    project.dvc("repro", "-s", "evaluate", "--force")


def test_code_that_changes_while_it_trains(project: Project) -> None:
    """The run is right, and recorded; DVC does not note it for the code of now."""
    loop = project.root / "runkey/training/loop.py"
    evaluation = project.root / "runkey/pipeline/validation.py"
    before = loop.read_text()
    text = evaluation.read_text()
    # The change comes from the training itself, at a known moment: when it builds the evaluation.
    evaluation.write_text(
        text.replace(
            "    prepared = root / paths.PREPARED\n",
            "    prepared = root / paths.PREPARED\n"
            '    late = root / "runkey/training/loop.py"\n'
            '    late.write_bytes(late.read_bytes() + b"LATE = 1\\n")\n',
        )
    )
    key = make_recipe("train", project.root).key
    line = refused(project, "repro", "train")
    assert line.startswith(f"the code of key {key[:16]} changed since this began; the run is")
    assert "LATE" in loop.read_text()
    assert project.json("run.json")["key"] == key
    assert key[:16] in project.run(sys.executable, "-m", "runkey", "list").stdout
    evaluation.write_text(text)
    loop.write_text(before)


def test_a_second_dvc_changes_the_parameters_while_the_first_trains(project: Project) -> None:
    """`dvc exp run -S` may write params.yaml before it finds that DVC is locked."""
    params = project.root / "params.yaml"
    text = params.read_text().replace("  epochs: 2\n", "  epochs: 60\n")
    params.write_text(text)
    key = make_recipe("train", project.root).key
    dvc = str(Path(sys.executable).with_name("dvc"))
    folder = project.root / ".runkey" / key
    with (project.root.parent / "said").open("w+") as said:
        first = subprocess.Popen(
            [dvc, "repro", "train"], cwd=project.root, env=clean_environment(), stdout=said,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        while not list(folder.glob("*.ckpt")):
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(
            [dvc, "exp", "run", "-S", "lr=0.0005"], cwd=project.root, env=clean_environment(),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert second.returncode
        assert "lock" in second.stderr
        # It has written it, or not, by where it was refused.
        params.write_text(re.sub(r"\nlr: \S+", "\nlr: 0.0005", params.read_text()))
        assert first.wait(600)
        said.seek(0)
        line = in_one_line(said.read())
    assert f"the params of key {key[:16]} changed since this began; the run is recorded" in line
    run_id = project.json("run.json")["run_id"]
    assert project.json("run.json")["key"] == key
    recorded = load_params(project.root / f"mlartifacts/{run_id}/artifacts/params.yaml")
    assert recorded == parse_params(YAML(typ="safe", pure=True).load(text))
    params.write_text(text)
    assert f"finished run {run_id[:8]} of " in in_one_line(project.dvc("repro", "train"))
