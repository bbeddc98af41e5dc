"""dvc.yaml: no idle dependency, no missing parameter (tests/identity has what must be there)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from runkey.identity.code import import_closure
from runkey.identity.dvc_yaml import Stage, covers, read_pipeline
from runkey.params import load_params
from runkey.params.render import preset_files, render_preset

ROOT = Path(__file__).parents[2]
STAGES = read_pipeline(ROOT, load_params(ROOT / "params.yaml").flat())


@pytest.fixture(params=list(STAGES))
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


TELLING = ("runkey/api.py", "runkey/errors.py", "runkey/progress.py", "runkey/version.py")
"""Draws nothing, nor do identity, params and the like, which `report` reads a run with."""


def drawing_code() -> set[str]:
    """What the pictures are drawn by, and the formats of the files that they are drawn from."""
    # hints.py takes types alone from training.
    folders = ("runkey/identity/", "runkey/params/", "runkey/training/")
    modules = ("curves", "evaluation", "sheets", "report")
    return {
        file
        for name in modules
        for file in import_closure(f"runkey.plots.{name}", ROOT, (*TELLING, *folders))
        if not file.endswith("__init__.py")
    }


def test_there_are_the_four_stages_and_the_pictures() -> None:
    computing = ["prepare", "profile_memory", "train", "evaluate"]
    assert list(STAGES) == ["check", *computing, "plots"]
    commands = [f"python -m stages.{name}" for name in computing]
    beside = ("python -m runkey params --check", "python -m runkey draw")
    assert [s.cmd for s in STAGES.values()] == [beside[0], *commands, beside[1]]


def test_the_check_looks_at_all_that_can_change_a_result_and_is_in_no_key() -> None:
    check = STAGES["check"]
    tree = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    assert set(check.params) == set(tree) - {"runtime"}
    assert (check.deps, check.outs) == ((), (".initial_weights",))
    assert not any(
        covers(out, dep) for s in STAGES.values() for dep in s.deps for out in check.outs
    )
    # DVC sees weights that change; keys hold their hash.
    tree = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
    depend = [n for n, s in tree["stages"].items() if check.outs[0] in s.get("deps", ())]
    assert depend == ["train"]


def test_pictures_are_drawn_again_when_their_code_changes_and_by_nothing_else() -> None:
    deps = STAGES["plots"].deps
    shared = {"runkey/hashing.py", "runkey/paths.py", "runkey/files.py", "runkey/units.py"}
    missing = {file for file in drawing_code() if not any(covers(dep, file) for dep in deps)}
    assert missing <= shared | {"runkey/evaluation/coco.py"}  # imported for its types alone
    others = [stage for name, stage in STAGES.items() if name != "plots"]
    assert [s.name for s in others if any(covers(d, "runkey/plots/style.py") for d in s.deps)] == []
    pictures = [out for stage in others for out in stage.outs if out.startswith("plots")]
    assert pictures == []


def test_every_plot_of_dvc_is_an_output() -> None:
    tree = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
    files = [path for plot in tree["plots"] for path in _files_of(plot)]
    outs = [out for stage in STAGES.values() for out in stage.outs]
    assert len(files) > 15
    assert [file for file in files if not any(covers(out, file) for out in outs)] == []


def _files_of(plot: Any) -> list[str]:
    return [plot] if isinstance(plot, str) else [f for one in plot.values() for f in one["y"]]


def test_no_dependency_on_code_that_is_not_imported(stage: Stage) -> None:
    closure = set(import_closure(stage.module, ROOT))
    if stage.name == "plots":
        closure = drawing_code() | {"runkey/pipeline/draw.py"}
    code = [dep for dep in stage.deps if dep.startswith(("runkey", "stages"))]
    idle = [dep for dep in code if not any(covers(dep, file) for file in closure)]
    assert idle == []


@pytest.mark.parametrize("name", preset_files())
def test_every_rendered_preset_holds_the_listed_parameters(stage: Stage, name: str) -> None:
    # DVC takes a name that params.yaml does not write out for an error, defaults or not.
    tree = YAML(typ="safe", pure=True).load(render_preset(name))
    assert [listed for listed in stage.params if not _holds(tree, listed)] == []


def test_only_what_adds_to_a_run_depends_on_which_run_it_was() -> None:
    assert [s.name for s in STAGES.values() if "run.json" in s.deps] == ["evaluate", "plots"]


def test_outputs_are_ignored_by_git_and_metrics_are_not(stage: Stage) -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "--stdin"],
        input="\n".join(stage.outs),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert ignored == [out for out in stage.outs if not out.startswith("metrics/")]


def _holds(tree: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True
