"""A training that cannot go well, as its user sees it: real DVC, real data, real checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import Project, clean_environment, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LAYER = "transformer.encoder.layers.0.linear1"
OVERFLOWING = f"""
import torch
from runkey.model.detr import build_model
from runkey.params import load_params
from pathlib import Path
torch.manual_seed(0)
state = build_model(load_params(Path("params.yaml")).model, 2).state_dict()
state["{LAYER}.weight"][0, 0] = 3e38
torch.save(state, "start.pth")
"""


def call(project: Project, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail."""
    return subprocess.run(
        command,
        cwd=project.root,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def failed(project: Project) -> str:
    """What `dvc repro` said of a training that starts from a huge weight: errors on one line."""
    project.run(sys.executable, "-c", OVERFLOWING)
    params = project.root / "params.yaml"
    text = params.read_text()
    for old, new in (
        ("init_from: null", "init_from: start.pth"),
        ("max_skips: 10", "max_skips: 2"),
        ("max_rollbacks: 3", "max_rollbacks: 1"),
        ("  epochs: 2", "  epochs: 4"),
        ("evaluate_every: 1", "evaluate_every: 4"),
    ):
        assert old in text
        text = text.replace(old, new)
    params.write_text(text)
    done = call(project, str(Path(sys.executable).with_name("dvc")), "repro", "train")
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_the_training_stops_with_a_report(project: Project, failed: str) -> None:
    [line] = [line for line in failed.splitlines() if line.startswith("error: step ")]
    assert "loss or gradients were not finite in 2 of the last" in line
    assert "already rolled back 1 time; see " in line
    assert "`runkey debug-step --step 3`" in line
    skipped = "is skipped: loss or gradients are not finite (micro-batch 1: logits of "
    assert skipped in in_one_line(failed)
    [report] = project.root.glob(".runkey/rk2-*/bad-step-3.json")
    assert json.loads(report.read_text())["outcome"] == "stopped: already rolled back 1 time"
    # MLflow's run has them too, and is marked as failed.
    kept = {path.name for path in project.root.glob("mlartifacts/*/artifacts/reports/*.json")}
    assert kept == {"bad-step-1.json", "bad-step-3.json"}


def test_debug_step_names_the_layer(project: Project, failed: str, tmp_path: Path) -> None:
    runkey = (sys.executable, "-m", "runkey", "debug-step")
    done = call(project, *runkey)
    assert done.returncode == 0, done.stderr
    assert f"forward pass: {LAYER} (Linear) takes finite numbers and gives others" in done.stdout
    assert "weight   float32 [16 x 16]  finite" in done.stdout
    assert "absmax 3e+38" in done.stdout
    assert "the losses are those of the log, to the last digit" in done.stdout
    [bundle] = project.root.glob(".runkey/rk2-*/bad-step-3.pt")
    assert f"runkey debug-step {bundle}" in done.stdout

    # Elsewhere: neither data, nor checkpoints, nor parameters.
    shutil.copy(bundle, tmp_path / "bad-step-3.pt")
    elsewhere = subprocess.run(
        (*runkey, str(tmp_path / "bad-step-3.pt"), "--json"),
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(project.root)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    finding = json.loads(elsewhere.stdout)["finding"]
    assert (finding["where"], finding["module"]) == ("forward", LAYER)
    numbers = finding["tensors"]["output"]
    assert f"{numbers['nan']} NaN, {numbers['inf']} inf" in done.stdout


def test_what_cannot_be_debugged_is_one_line(project: Project, failed: str) -> None:
    runkey = (sys.executable, "-m", "runkey", "debug-step")
    for arguments, line in (
        (("rk2-00",), "holds no training of key rk2-00; one that ended well leaves nothing to"),
        (("--step", "99"), "--step 99: training has the steps 1 to 12"),
        (("nothing.pt",), "nothing.pt: not found"),
    ):
        done = call(project, *runkey, *arguments)
        assert done.returncode == 1
        [error] = done.stderr.splitlines()
        assert line in error
