"""The commands of DVC's extension for VS Code, word for word, and what it needs of the answers.

They are those of its public code (iterative/vscode-dvc, `extension/src/cli/dvc/reader.ts`
and `contract.ts`).  What the extension itself showed, opened once in VS Code: docs/dvc.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LEAST_VERSION = (3, 33, 3)
"""Of DVC; the extension refuses older ones."""
CURVES = {
    *("loss", "AP", "training loss", "learning rate", "gradient norm"),
    *("precision and recall", "confusion"),
}
ANCHORS = {"<DVC_METRIC_DATA>", "<DVC_METRIC_TITLE>", "<DVC_METRIC_PLOT_WIDTH>"}


@pytest.fixture(scope="module")
def compared(project: Project) -> Project:
    """The project with an experiment."""
    project.dvc("exp", "run", "-S", "lr=5e-4", "--name", "slower")
    return project


def asked(project: Project, *arguments: str) -> Any:
    """DVC's JSON; nothing else may be on stdout."""
    return json.loads(project.run("dvc", *arguments).stdout)


def test_it_is_a_project_of_a_version_that_the_extension_takes(compared: Project) -> None:
    version = compared.run("dvc", "--version").stdout
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    assert found
    assert tuple(map(int, found.groups())) >= LEAST_VERSION
    assert compared.run("dvc", "root").stdout.strip() == "."


def test_the_table_of_experiments(compared: Project) -> None:
    head = compared.run("git", "rev-parse", "HEAD").stdout.strip()
    workspace, commit = asked(compared, "exp", "show", "--rev", head, "--json")
    assert workspace["rev"] == "workspace"
    assert commit["rev"] == head
    (experiment,) = commit["experiments"]
    (slower,) = experiment["revs"]
    assert slower["name"] == "slower"
    for row, lr in ((commit, 1e-3), (slower, 5e-4)):
        data = row["data"]
        assert data["params"]["params.yaml"]["data"]["lr"] == lr
        metrics = {n: v for file in data["metrics"].values() for n, v in file["data"].items()}
        assert set(metrics) >= {"AP", "AP50", "AP75", "val_loss", "train_loss", "seconds"}
        assert all(isinstance(value, int | float) for value in metrics.values())
        assert not any("error" in file for file in (*data["metrics"].values(),))
        # Columns of the extension's table: what the stages need and make.
        assert {"data", "model", "prepared"} <= set(data["deps"])
        assert {"model", "plots", "run.json"} <= set(data["outs"])


def test_curves_and_pictures_of_both_side_by_side(compared: Project) -> None:
    head = compared.run("git", "rev-parse", "HEAD").stdout.strip()
    folder = Path(".dvc/tmp/plots")
    answer = asked(
        compared,
        *("plots", "diff", head, "slower", "-o", str(folder), "--split", "--json"),
    )
    assert answer.get("errors", []) == []
    kinds = {path: shown[0]["type"] for path, shown in answer["data"].items()}
    assert {path for path, kind in kinds.items() if kind == "vega"} == CURVES
    pictures = {path: shown for path, shown in answer["data"].items() if kinds[path] == "image"}
    assert {"plots/learning_rate.png", "plots/worst.jpg", "memory/timeline.png"} < set(pictures)
    for shown in pictures.values():
        assert len(shown) == 2
        assert all(Path(one["url"]).is_file() for one in shown)
    for path in CURVES:
        (curve,) = answer["data"][path]
        assert set(curve["anchor_definitions"]) >= ANCHORS
        points = curve["anchor_definitions"]["<DVC_METRIC_DATA>"]
        assert {point["rev"] for point in points} == set(curve["revisions"])
        assert len(curve["revisions"]) == 2


def test_files_and_stages(compared: Project) -> None:
    status = asked(compared, "data", "status", "--granular", "--unchanged", "--json")
    assert "not_in_cache" not in status
    changed = {name for part in ("committed", "uncommitted") for name in status.get(part, {})}
    assert changed <= {"modified", "added"}
    stages = compared.run("dvc", "stage", "list").stdout
    assert [line.split()[0] for line in stages.splitlines()] == [
        *("prepare", "profile_memory", "train", "evaluate", "plots"),
    ]
    assert compared.run("dvc", "dag", "--md").stdout.startswith("```mermaid")
