"""`runkey export-model` of a run that real DVC made: its own val images, recorded on the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runkey.tracking.store import locate_store, open_client
from tests.support.project import Project, clean_environment

REPOSITORY = Path(__file__).parents[2]
INSTALLED = REPOSITORY / ".venv-export"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not INSTALLED.exists(), reason="`make env-export` installs ONNX Runtime"),
]


def runkey(project: Project, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runkey", *words],
        cwd=project.root, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip


def test_an_export_is_compared_on_the_runs_val_images_and_recorded(project: Project) -> None:
    (project.root / ".venv-export").symlink_to(INSTALLED)
    key, run_id = (project.json("run.json")[name] for name in ("key", "run_id"))
    done = runkey(project, "export-model", key[:12])
    assert done.returncode == 0, done.stderr
    assert "the run's 6 val images: AP 0." in done.stdout
    parity = project.json("onnx-fp32/parity.json")
    assert parity["passed"] is True
    evaluated = project.json("metrics/evaluate.json")["AP"]
    assert parity["ap"] == pytest.approx(evaluated, abs=5e-4)
    assert parity["ap_model"] == evaluated, "to all digits"
    card = project.json("onnx-fp32/card.json")
    assert card["key"] == key
    assert card["data"]["images"] == {"train": 12, "val": 6}
    assert card["thresholds"] == {
        name: one["score"]
        for name, one in project.json("evaluation/thresholds.json")["classes"].items()
        if one
    }
    run = open_client(locate_store(project.root)).get_run(run_id)
    assert run.data.metrics["export/onnx-fp32/AP"] == parity["ap"]
    assert run.data.tags["export.onnx-fp32"].startswith("passed (the run's 6 val images: AP 0.")
    shown = runkey(project, "show", key[:12], "--json")
    assert '"onnx-fp32"' in shown.stdout
    folder = runkey(project, "get", key[:12], "--to", "got", "--only", "model")
    assert folder.returncode == 0
    done = runkey(project, "export-model", "got", "--limit", "4", "--out", "limited")
    assert "4 of the run's 6 val images: AP 0." in done.stdout
    assert "no faults" in runkey(project, "verify", key[:12]).stdout
    params = project.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("long_side: 64", "long_side: 80"))
    done = runkey(project, "export-model", "got", "--out", "other")
    assert done.returncode == 1
    assert "params.yaml: other than the run's: data.long_side 80 (the run's: 64)" in done.stderr
    params.write_text(text)
    (project.root / "data/val/val_1.png").unlink()
    done = runkey(project, "export-model", "got", "--out", "other")
    assert done.returncode == 1
    assert "not what data.dvc says" in done.stderr
