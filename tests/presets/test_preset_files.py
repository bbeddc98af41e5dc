"""Every preset is a complete, commented parameter file that builds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.postprocess import build_postprocess
from runkey.params import Params, load_params, parse_params
from runkey.params.render import head_of, main, render

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
NAMES = [path.stem for path in PRESETS]


def test_the_four_are_there():
    assert set(NAMES) >= {"sample", "blood-cells", "coco-detr-r50", "coco-detr-r101"}


def field_names(tree, prefix=""):
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from field_names(value, f"{prefix}{name}.")


@pytest.mark.parametrize("path", [*PRESETS, ROOT / "params.yaml"], ids=[*NAMES, "params"])
def test_file_holds_exactly_the_schemas_fields(path):
    tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    wanted = parse_params({"lr": 1, "seed": 0}).model_dump(mode="json")
    assert list(field_names(tree)) == list(field_names(wanted))


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_comments_are_the_schemas(path):
    """After a change of the schema: python -m runkey.params.render params.yaml presets/*.yaml."""
    text = path.read_text(encoding="utf-8")
    assert render(load_params(path), head_of(text)) == text


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_head_names_the_source(path):
    head = head_of(path.read_text(encoding="utf-8"))
    assert head.startswith(f"# {path.stem}: ")
    assert "# Source: " in head


def test_the_committed_params_are_the_sample_preset():
    """As committed: what somebody is just trying out in params.yaml is not this test's business."""
    texts = [
        subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, check=True)
        for path in ("params.yaml", "presets/sample.yaml")
    ]
    assert texts[0].stdout == texts[1].stdout


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_preset_builds(path):
    params = load_params(path)
    # The one thing that would need a download.
    model = params.model.model_copy(update={"backbone_weights": "none"})
    detector = build_model(model, num_classes=80)
    build_criterion(model, num_classes=80)
    build_postprocess(model)
    millions = sum(p.numel() for p in detector.parameters()) / 1e6
    expected = {"sample": 0.62, "blood-cells": 0.62, "coco-detr-r50": 41, "coco-detr-r101": 60}
    assert millions == pytest.approx(expected[path.stem], rel=0.15)
    assert all(torch.isfinite(p).all() for p in detector.parameters())


def test_render_keeps_values_and_head(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("# mine\n# two\nlr: 5e-5\nseed: 3\ntraining: {precision: off}\n")
    before = load_params(path)
    main([str(path)])
    text = path.read_text(encoding="utf-8")
    assert load_params(path) == before
    assert head_of(text) == "# mine\n# two"
    # Both words mean other things to YAML 1.1 readers when written plainly.
    assert "lr: 5.0e-05\n" in text
    assert '  precision: "off"\n' in text
    assert all(line.strip() for line in head_of(text).splitlines())


def test_every_field_says_what_it_does():
    def undescribed(schema, sections, prefix=""):
        for name, field in schema["properties"].items():
            section = sections.get(field.get("$ref", "").rpartition("/")[2])
            if not field.get("description") and not (section or {}).get("description"):
                yield prefix + name
            if section:
                yield from undescribed(section, sections, f"{prefix}{name}.")

    schema = Params.model_json_schema()
    assert list(undescribed(schema, schema["$defs"])) == []
