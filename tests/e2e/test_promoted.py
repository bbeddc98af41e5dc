"""A run from `dvc repro` to `models:/...@production`: what `evaluate` records, what then loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from runkey.hashing import sha256_file
from runkey.identity.key import short_key
from runkey.tracking.store import locate_store, open_client
from tests.support.project import Project, clean_environment, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

USE = """\
import pathlib, sys, runkey
by_key, by_alias = runkey.load(sys.argv[1]), runkey.load("models:/tiny@production")
image = next(pathlib.Path("data/val").iterdir())
print(by_alias.card.key == by_key.card.key, by_alias.card.thresholds == by_key.card.thresholds)
print((by_alias(image, score=0).scores == by_key(image, score=0).scores).all())
"""


def test_from_repro_to_production(project: Project) -> None:
    run = project.json("run.json")
    label = short_key(run["key"])
    thresholds = project.json("evaluation/thresholds.json")
    assert thresholds["weights"] == sha256_file(project.root / "model/weights.safetensors")
    assert set(thresholds["classes"]) == {"red", "blue"}
    said = in_one_line(project.first_output)
    assert "score thresholds of best F1" in said or "no class was found in val" in said

    client = open_client(locate_store(project.root))
    (output,) = client.get_run(run["run_id"]).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.name == f"detector-fast-{label}"
    assert model.tags["key"] == run["key"]
    assert model.tags["mlflow.note.content"].startswith("**AP ")
    metrics = {one.key: one.value for one in model.metrics}
    assert metrics["eval/AP"] == project.json("evaluation/metrics.json")["AP"]
    assert "class_AP/red" in metrics

    promoted = project.run(sys.executable, "-m", "runkey", "promote", label).stdout
    assert promoted == f"{label}: tiny version 1 is models:/tiny@production\n"
    used = project.run(sys.executable, "-c", USE, label).stdout
    assert used.splitlines() == ["True True", "True"]
    refused = subprocess.run(
        [sys.executable, "-m", "runkey", "delete", label, "--apply"],
        cwd=project.root,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "is promoted as tiny@production; promote another run first" in in_one_line(
        refused.stderr
    )
    project.dvc("repro", "-f", "evaluate")
    assert len(client.get_run(run["run_id"]).outputs.model_outputs) == 1  # nothing new
    found = json.loads(project.run(sys.executable, "-m", "runkey", "list", "--json").stdout)
    assert len(found) == 1
