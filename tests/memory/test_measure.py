"""The real training step, measured in a process of its own, as the stage does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.data.index import ClassName, Record, write_classes, write_index
from runkey.memory.plan import read_plan
from runkey.params import Params, load_params
from runkey.params.render import render

ROOT = Path(__file__).resolve().parents[2]


def workspace(folder: Path, changes: dict[str, object]) -> Params:
    """A folder in which `python -m stages.profile_memory` runs: parameters and an index."""
    params = load_params(ROOT / "presets/sample.yaml")
    tree = params.model_dump() | {"runtime": {"device": "cpu"}}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        tree[section] = tree[section] | {key: value}
    params = Params.model_validate(tree)
    (folder / "params.yaml").write_text(render(params, "# test"))
    for name in ("stages", "runkey"):
        (folder / name).symlink_to(ROOT / name)
    prepared = folder / "prepared"
    prepared.mkdir()
    boxes = tuple((10.0 * i, 10.0, 9.0, 9.0) for i in range(8))
    record = Record(
        id=1,
        file="1.jpg",
        width=640,
        height=480,
        rotate=0,
        mirror=False,
        boxes_xywh=boxes,
        labels=(0,) * 8,
        areas=(81.0,) * 8,
        crowd=(False,) * 8,
        annotation_ids=tuple(range(8)),
    )
    write_index(prepared / "train.json", [record])
    write_classes(prepared / "classes.json", [ClassName(i, i + 1, str(i)) for i in range(8)])
    return params


def profile(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, "-m", "stages.profile_memory"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_sample_fits_at_once(tmp_path):
    """On any machine that can train at all: eight images in one pass."""
    workspace(tmp_path, {})
    result = profile(tmp_path)
    assert result.returncode == 0, result.stderr
    plan = read_plan(tmp_path / "memory/memory.json", batch_size=8)
    assert (plan.micro_batch, plan.accumulation, plan.chosen_by) == (8, 1, "measured")
    measured = json.loads((tmp_path / "memory/measured.json").read_text())
    assert [peak["images"] for peak in measured["peaks"]] == [2, 4]
    # torch itself is some 300 MB; the little model's step adds some tens an image.
    assert 200e6 < measured["peaks"][0]["bytes"] < 2e9
    assert 1e6 < measured["line"]["bytes_per_image"] < 1e8
    assert "micro-batch 8, 1 forward pass a step" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_line_predicts_and_the_budget_cuts(tmp_path):
    """Larger images: measured at 2 and 4, predicted for 8, and obeyed."""
    large = {"data.short_sides": (240,), "data.long_side": 320}
    folders = [tmp_path / name for name in ("line", "check", "tight", "none")]
    for folder in folders:
        folder.mkdir()
    workspace(folders[0], large)
    assert profile(folders[0]).returncode == 0
    line = json.loads((folders[0] / "memory/measured.json").read_text())["line"]
    predicted = line["base_bytes"] + 8 * line["bytes_per_image"]

    # In the same run: a number in training.micro_batch is obeyed, though the budget is too small.
    asked = {"memory.probe_batches": (7, 8), "memory.budget_gib": 0.3, "training.micro_batch": 5}
    workspace(folders[1], large | asked)
    result = profile(folders[1])
    assert result.returncode == 0, result.stderr
    plan = read_plan(folders[1] / "memory/memory.json")
    assert (plan.micro_batch, plan.accumulation, plan.chosen_by) == (4, 2, "training.micro_batch")
    assert "warning: training.micro_batch asks for more than the budget" in result.stdout
    peaks = json.loads((folders[1] / "memory/measured.json").read_text())["peaks"]
    # Too much rather than too little: the second trial finds the heap in the first one's pieces.
    assert 0.95 < predicted / peaks[1]["bytes"] < 1.15

    # Room for about three images.
    budget = (line["base_bytes"] + 3.5 * line["bytes_per_image"]) / 2**30 + 0.25
    workspace(folders[2], large | {"memory.budget_gib": budget})
    result = profile(folders[2])
    assert result.returncode == 0, result.stderr
    plan = read_plan(folders[2] / "memory/memory.json")
    assert plan.chosen_by == "measured"
    assert 2 <= plan.micro_batch <= 4
    assert plan.micro_batch * plan.accumulation >= 8
    tight = json.loads((folders[2] / "memory/measured.json").read_text())
    limit = tight["budget_bytes"] - tight["spare_bytes"]
    assert tight["predicted_bytes"] <= limit
    assert tight["line"]["base_bytes"] + 5 * tight["line"]["bytes_per_image"] > limit

    workspace(folders[3], large | {"memory.budget_gib": 0.3})
    result = profile(folders[3])
    assert result.returncode == 1
    assert result.stderr.startswith("error: memory.budget_gib: a training step of one image takes ")
    assert len(result.stderr.splitlines()) == 1
    assert not (folders[3] / "memory").exists()
