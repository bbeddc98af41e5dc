"""`runkey predict` on a run's val images: the detections that `evaluate` judged, the same AP."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.predict import average_precision
from tests.support.project import TINY, Project, begin_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def by_image(rows: list[Any]) -> dict[int, list[tuple[float, ...]]]:
    """Score, category and box of each detection, best first."""
    found: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        found.setdefault(row["image_id"], []).append(
            (row["score"], row["category_id"], *row["bbox"])
        )
    return found


@pytest.fixture(params=["auto", "bf16"])
def evaluated(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    """A project after `dvc repro`, with each training.precision."""
    if request.param == "auto":
        made: Project = request.getfixturevalue("project")
        return made
    training = TINY["training"] | {"precision": request.param}
    begun = begin_project(tmp_path / "repository", TINY | {"training": training})
    begun.dvc("repro", "evaluate")
    return begun


def test_the_detections_are_those_that_evaluate_judged(evaluated: Project) -> None:
    project = evaluated
    truth = project.root / "data/annotations/instances_val.json"
    done = project.run(
        *(sys.executable, "-m", "runkey", "predict", "model", "data/val", "--score", "0"),
        *("--coco", str(truth), "--write", "results,json", "--json"),
    )
    assert json.loads(done.stdout)["skipped"] == []
    judged = by_image(json.loads((project.root / "evaluation/predictions.json").read_text()))
    found = by_image(json.loads((project.root / "predictions/results.json").read_text()))
    assert found.keys() == judged.keys()
    for image, rows in judged.items():
        assert len(found[image]) == len(rows)
        ours, theirs = np.array(found[image]), np.array(rows)
        assert np.allclose(ours[:, 0], theirs[:, 0], atol=1e-5)
        # Rows of nearly the same score may stand in another order.
        same = np.isclose(ours[:, None], theirs[None], atol=0.01).all(-1).any(1)
        assert same.all()
    metrics = project.json("evaluation/metrics.json")
    for path in ("results.json", "predictions.json"):
        content = json.loads((project.root / "predictions" / path).read_text())
        rows = content["annotations"] if isinstance(content, dict) else content
        results = Path(project.root / "predictions/rows.json")
        results.write_text(json.dumps(rows))
        ap, ap50 = average_precision(truth, results, most=100)
        assert round(ap, 3) == round(metrics["AP"], 3)
        assert round(ap50, 3) == round(metrics["AP50"], 3)
