"""The stage itself: the prediction beside the real training step, run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from runkey.errors import TrainingError
from runkey.files import write_json
from runkey.memory.measure import TrialJob, TrialResult, read_as, run_trial, wait_for
from runkey.memory.predict import read_model, write_model
from runkey.memory.trace.events import MicroBatch
from runkey.memory.trace.record import BatchFields, BuiltStep, synthetic_batch
from runkey.params import Params, override
from runkey.params.render import render

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def run_stage(folder: Path, params: Params, prepared: Path) -> subprocess.CompletedProcess[str]:
    """`python -m stages.profile_memory` in a folder with parameters and an index."""
    (folder / "params.yaml").write_text(render(params, "# test"))
    for name in ("stages", "runkey"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "prepared").symlink_to(prepared)
    return subprocess.run(
        [sys.executable, "-m", "stages.profile_memory"],
        cwd=folder,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_stage(small_params, prepared, prediction, tmp_path):
    """Another process predicts the same, to the byte, and measures this machine's step."""
    result = run_stage(tmp_path, small_params, prepared)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "memory"
    write_model(tmp_path / "again", prediction.model)
    assert (out / "memory.json").read_bytes() == (tmp_path / "again/memory.json").read_bytes()
    assert read_model(out / "memory.json") == prediction.model
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "timeline.svg").read_text()
    measured = json.loads((out / "measured.json").read_text())
    assert [peak["images"] for peak in measured["peaks"]] == [2, 4]
    # torch itself is some 300 MB; the little model's step adds some tens an image.
    assert 200e6 < measured["peaks"][0]["bytes"] < 2e9
    assert 0 <= measured["line"]["bytes_per_image"] < 1e8
    assert "measured on this CPU: 2 images " in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_line_of_a_cpu_predicts(small_params, prepared, tmp_path):
    """Larger images: measured at 2 and 4, predicted for 8, and measured there."""
    large = {"data.short_sides": (240,), "data.long_side": 320, "training.batch_size": 8}
    lines = []
    for name, probes in (("line", (2, 4)), ("check", (7, 8))):
        folder = tmp_path / name
        folder.mkdir()
        params = override(small_params, large | {"memory.probe_batches": probes})
        assert run_stage(folder, params, prepared).returncode == 0
        lines.append(json.loads((folder / "memory/measured.json").read_text()))
    predicted = lines[0]["line"]["base_bytes"] + 8 * lines[0]["line"]["bytes_per_image"]
    # Too much rather than too little: the second trial finds the heap in the first one's pieces.
    assert 0.95 < predicted / lines[1]["peaks"][1]["bytes"] < 1.15


def test_synthetic_batch_is_padded_and_full():
    batch = synthetic_batch(MicroBatch(3, 40, 60, 5), BatchFields(4, 2))
    assert batch.images.shape == (3, 3, 40, 60)
    assert batch.counts == (5, 5, 5)
    assert batch.labels.max() < 4
    assert batch.sizes.tolist() == [[40, 60], [40, 60], [30, 60]]


def job(*worst: MicroBatch) -> TrialJob:
    return TrialJob(worst, (worst[:1],), BatchFields(4, None), budget_gib=2.5, outside_bytes=9)


def factory_of(step):
    return lambda device: BuiltStep(step, nn.Identity(), torch.optim.SGD([torch.ones(1)]), None)


def test_a_trial_runs_each_window_and_tells_of_peaks(tmp_path):
    seen = []

    def step(window):
        seen.append([len(batch) for batch in window])

    asked = job(MicroBatch(2, 40, 60, 5), MicroBatch(3, 40, 60, 5))
    write_json(tmp_path / "job.json", asdict(asked))
    assert read_as(TrialJob, tmp_path / "job.json") == asked
    result = run_trial(factory_of(step), asked, CPU)
    assert seen == [[2, 2], [2, 2], [3, 3], [3, 3], [2]]
    assert [peak.images for peak in result.peaks] == [2, 3]
    assert result.passed(asked)
    write_json(tmp_path / "result.json", asdict(result))
    assert read_as(TrialResult, tmp_path / "result.json") == result


def test_a_step_that_does_not_fit_is_named():
    def step(window):
        torch.empty(2**50, dtype=torch.uint8)

    with pytest.raises(TrainingError) as caught:
        run_trial(factory_of(step), job(MicroBatch(2, 40, 60, 5)), CPU)
    assert str(caught.value) == (
        "memory.probe_batches: a training step of 2 images of 40 x 60 pixels does not fit in "
        "memory; lower memory.probe_batches, data.short_sides and data.long_side, "
        "or set model.checkpointing: true"
    )


def test_other_faults_of_a_step_are_not_hidden():
    def step(window):
        torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match="size of tensor"):
        run_trial(factory_of(step), job(MicroBatch(2, 40, 60, 5)), CPU)


def test_death_of_the_measuring_process_is_named(tmp_path):
    def ended(code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)

    killed = ended("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(
        TrainingError, match=r"^memory.probe_batches: the machine ran out of memory"
    ):
        wait_for(killed)
    with pytest.raises(SystemExit) as caught:
        wait_for(ended("raise SystemExit(3)"))
    assert caught.value.code == 3
    wait_for(ended("pass"))
