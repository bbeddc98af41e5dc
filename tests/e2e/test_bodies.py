"""Bodies that pad or come from timm through the stages: memory, training, evaluation, use."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import runkey
from runkey.params import override, parse_params
from runkey.params.render import render
from tests.support.project import TINY, Project, begin_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 45 x 60 pixels: no side is a multiple of a stride.
ODD = {"data.short_sides": [45], "data.long_side": 61, "runtime.mlflow": False}
BODIES = {
    "lite0": {"model.feature_strides": [8, 16, 32]},
    "timm:convnext_atto": {"model.feature_strides": [8, 16]},
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = begin_project(tmp_path_factory.mktemp("bodies") / "repository", TINY)
    (project.root / "params.yaml").write_text(render(override(parse_params(TINY), ODD), "# odd"))
    project.run(sys.executable, "-m", "stages.prepare")
    return project


@pytest.mark.parametrize("body", BODIES)
def test_a_body_goes_through_the_stages_and_detects_what_evaluate_found(
    begun: Project, body: str
) -> None:
    values = {"model.backbone": body, "model.backbone_weights": "none", **ODD, **BODIES[body]}
    params = override(parse_params(TINY), values)
    (begun.root / "params.yaml").write_text(render(params, f"# {body}"))
    for stage in ("profile_memory", "train", "evaluate"):
        begun.run(sys.executable, "-m", f"stages.{stage}")

    trained = begun.json("metrics/train.json")
    assert trained["epochs"] == 2
    assert np.isfinite(trained["train_loss"])
    assert begun.json("memory/memory.json")
    assert begun.json("memory/measured.json")

    model = runkey.load(begun.root / "model", device="cpu")
    images = begun.json("data/annotations/instances_val.json")["images"]
    paths = [Path(begun.root / "data/val" / one["file_name"]) for one in images]
    rows = begun.json("evaluation/predictions.json")
    for image, found in zip(images, model(paths, score=0), strict=True):
        expected = [row for row in rows if row["image_id"] == image["id"]]
        assert len(expected) == len(found) > 0
        got = found.to_coco(image["id"])
        np.testing.assert_allclose(
            [row["score"] for row in got], [row["score"] for row in expected], atol=1e-5
        )
        np.testing.assert_allclose(
            [row["bbox"] for row in got], [row["bbox"] for row in expected], atol=0.01
        )
