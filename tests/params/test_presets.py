"""Every preset is small, keeps its values, renders as a complete file, and builds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.postprocess import build_postprocess
from runkey.params import Params, Schedule, load_params, parse_params
from runkey.params.render import (
    head_of,
    main,
    preset_files,
    reference,
    render,
    render_preset,
)

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
NAMES = [path.stem for path in PRESETS]


def test_the_five_are_there():
    assert set(NAMES) >= {"sample", "photos", "blood-cells", "coco-detr-r50", "coco-detr-r101"}
    assert {name: path.resolve() for name, path in preset_files().items()} == dict(
        zip(NAMES, PRESETS, strict=True)
    )


def test_presets_of_a_wheel_lie_in_the_package(tmp_path):
    shutil.copytree(ROOT / "runkey", tmp_path / "runkey")
    shutil.copytree(ROOT / "presets", tmp_path / "runkey" / "presets")
    code = "from runkey.params.render import preset_files; print(preset_files()['sample'].parent)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / "runkey" / "presets"


RESOLVED = json.loads((Path(__file__).parent / "resolved.json").read_text(encoding="utf-8"))
"""Every resolved value: at first those of commit 2c67da6, whose presets were complete files."""


@pytest.mark.parametrize("name", NAMES)
def test_resolved_values_are_those_of_the_complete_files(name):
    resolved = load_params(preset_files()[name]).flat(runtime=True)
    assert resolved == RESOLVED["defaults"] | RESOLVED["presets"][name]
    assert list(resolved) == list(RESOLVED["defaults"])


def test_defaults_are_as_they_were():
    assert parse_params({"lr": 0.001, "seed": 0}).flat(runtime=True) == RESOLVED["defaults"]


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read(text):
    return YAML(typ="safe", pure=True).load(text)


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_preset_is_small(path):
    text = path.read_text(encoding="utf-8")
    assert 10 <= len(text.splitlines()) <= 60
    written = dict(leaves(read(text)))
    differing = {n for n, v in RESOLVED["presets"][path.stem].items() if v != written[n]}
    assert differing == set()
    # Beside what differs: the two without a default, and flips, where the preset says why.
    plain = {"lr", "seed", "data.augment.flip_probability"}
    assert set(written) - set(RESOLVED["presets"][path.stem]) <= plain


@pytest.mark.parametrize("name", NAMES)
def test_rendered_file_holds_exactly_the_schemas_fields(name):
    text = render_preset(name)
    wanted = [n for n, _ in leaves(parse_params({"lr": 1, "seed": 0}).written())]
    assert [n for n, _ in leaves(read(text))] == wanted
    assert parse_params(read(text)) == load_params(preset_files()[name])
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_head_names_the_source(path):
    head = head_of(path.read_text(encoding="utf-8"))
    assert head.startswith(f"# {path.stem}: ")
    assert "# Source: " in head
    assert head_of(render_preset(path.stem)) == head


def test_params_yaml_is_the_rendered_sample_preset():
    """As committed, or in the working tree: either may differ while somebody works on it."""
    committed = subprocess.run(
        ["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    texts = [committed, (ROOT / "params.yaml").read_text(encoding="utf-8")]
    assert render_preset("sample") in texts, "runkey preset sample"


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_preset_builds(path):
    params = load_params(path)
    # The one thing that would need a download.
    model = params.model.model_copy(update={"backbone_weights": "none"})
    detector = build_model(model, num_classes=80)
    build_criterion(model, num_classes=80)
    build_postprocess(model)
    millions = sum(p.numel() for p in detector.parameters()) / 1e6
    expected = {"sample": 0.62, "photos": 1.16, "blood-cells": 0.62, "coco-detr-r50": 41}
    expected |= {"coco-detr-r101": 60}
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


def test_render_reads_what_load_params_reads(tmp_path):
    text = "# mine\nlr: 5e-5\nseed: 3\n"
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        path = tmp_path / encoding
        path.write_text(text, encoding=encoding)
        main([str(path)])
        assert head_of(path.read_text(encoding="utf-8")) == "# mine"


def test_a_list_of_values_that_is_longer_than_a_line_is_wrapped(monkeypatch):
    schema = Schedule.model_json_schema()
    schema["properties"]["name"]["enum"].append("warmup_stable_decay_" * 2)
    monkeypatch.setattr(Schedule, "model_json_schema", lambda: schema)
    text = render(parse_params({"lr": 1, "seed": 0}), "# mine")
    assert "| warmup_stable_decay_warmup_stable_decay_]" in text
    assert max(map(len, text.splitlines())) <= 100


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


def test_reference_page_is_generated():
    page = (ROOT / "docs/reference/params.md").read_text(encoding="utf-8")
    assert reference() == page, "make reference-docs"


def test_reference_page_has_every_parameter_once():
    names = re.findall(r"(?m)^\| `([\w.]+)` \|", reference())
    assert sorted(names) == sorted([*RESOLVED["defaults"], "data.checks.level"])
