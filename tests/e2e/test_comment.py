"""A comment in the model's code: DVC starts the train stage, which takes the finished run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runkey.identity.key import short_key
from tests.support.project import Project, clean_environment, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_stage_starts_and_puts_the_finished_run_in_place(project: Project) -> None:
    """DVC hashes bytes; the key is the same."""
    before, weights = (
        project.json("run.json"),
        (project.root / "model/weights.safetensors").read_bytes(),
    )
    path = project.root / "runkey/model/boxes.py"
    text = path.read_text()
    path.write_text(text.replace('"""', '"""Said again: ', 1) + "# A comment.\n")
    said = in_one_line(project.dvc("repro", "train"))
    label = f"key {short_key(before['key'])}"
    assert "Running stage 'train'" in said
    assert f"{label}: finished run {before['run_id'][:8]} of" in said
    assert f"{label}: no run of this key" not in said
    assert project.json("run.json") == before
    assert (project.root / "model/weights.safetensors").read_bytes() == weights
    # Nothing that takes seconds to import.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stages.train"],
        cwd=project.root,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "runkey.registry.once" in imported
    assert not {"torch", "mlflow", "dvc", "numpy"} & imported
