"""dvc.yaml: no idle dependency, no missing parameter (tests/identity has what must be there)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from runkey.identity.closure import import_closure
from runkey.identity.pipeline import Stage, covers, read_pipeline
from runkey.params import load_params
from runkey.params.presets import preset_files, render_preset

ROOT = Path(__file__).parents[2]
STAGES = read_pipeline(ROOT, load_params(ROOT / "params.yaml").flat())


@pytest.fixture(params=list(STAGES))
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


def test_there_are_the_four_stages() -> None:
    assert list(STAGES) == ["prepare", "profile_memory", "train", "evaluate"]
    assert [s.cmd for s in STAGES.values()] == [f"python -m stages.{name}" for name in STAGES]


def test_no_dependency_on_code_that_is_not_imported(stage: Stage) -> None:
    closure = import_closure(stage.module, ROOT)
    code = [dep for dep in stage.deps if dep.startswith(("runkey", "stages"))]
    idle = [dep for dep in code if not any(covers(dep, file) for file in closure)]
    assert idle == []


@pytest.mark.parametrize("name", preset_files())
def test_every_rendered_preset_holds_the_listed_parameters(stage: Stage, name: str) -> None:
    # DVC takes a name that params.yaml does not write out for an error, defaults or not.
    tree = YAML(typ="safe", pure=True).load(render_preset(name))
    assert [listed for listed in stage.params if not _holds(tree, listed)] == []


def test_only_evaluate_depends_on_which_run_it_was() -> None:
    assert [s.name for s in STAGES.values() if "run.json" in s.deps] == ["evaluate"]


def test_outputs_are_ignored_by_git_and_metrics_are_not(stage: Stage) -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", *stage.outs], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert ignored == [out for out in stage.outs if not out.startswith("metrics/")]


def _holds(tree: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True
