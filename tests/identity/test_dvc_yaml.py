"""dvc.yaml names all that its stages depend on: neither DVC nor a key can be stale."""

from pathlib import Path

import pytest

from runkey.identity.code import EXCLUDED, import_closure, is_excluded
from runkey.identity.dvc_yaml import covers, meets, read_pipeline
from runkey.identity.key import PARTS, make_recipe
from runkey.params import load_params

REPOSITORY = Path(__file__).parents[2]
STAGES = ("prepare", "profile_memory", "train", "evaluate")


@pytest.fixture(scope="module")
def flat():
    return load_params(REPOSITORY / "params.yaml").flat(runtime=True)


@pytest.fixture(scope="module")
def stages(flat):
    return read_pipeline(REPOSITORY, flat)


def test_the_stages_are_the_files(stages):
    assert tuple(stages) == ("check", *STAGES, "plots")  # the first and the last have no key
    assert [stages[name].module for name in STAGES] == [f"stages.{name}" for name in STAGES]
    files = {path.stem for path in (REPOSITORY / "stages").glob("[a-z]*.py")}
    assert files == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_every_file_that_a_stage_imports_is_covered_by_a_dependency(stages, name):
    deps = stages[name].deps
    closure = import_closure(f"stages.{name}", REPOSITORY)
    assert f"stages/{name}.py" in closure
    assert [file for file in closure if not any(covers(dep, file) for dep in deps)] == []


@pytest.mark.parametrize("name", STAGES)
def test_every_dependency_is_there_or_is_made_by_a_stage(stages, name):
    outs = [out for stage in stages.values() for out in stage.outs]
    for dep in stages[name].deps:
        made = any(meets(dep, out) for out in outs)
        tracked = (REPOSITORY / f"{dep}.dvc").is_file()
        assert made or tracked or (REPOSITORY / dep).exists(), dep


@pytest.mark.parametrize("name", STAGES)
def test_telemetry_makes_no_stage_run_again(stages, name):
    """What the key leaves out, DVC leaves out: else it would train again under the same key."""
    deps = stages[name].deps
    assert [dep for dep in deps if is_excluded(dep)] == []
    assert [
        entry
        for entry in EXCLUDED
        # A single file may lie in a folder that counts: the stage starts and finds its result.
        if entry.endswith("/") and any(covers(dep, entry.rstrip("/")) for dep in deps)
    ] == []


@pytest.mark.parametrize("name", STAGES)
def test_the_locked_environment_is_a_dependency(stages, name):
    assert "conda-lock.yml" in stages[name].deps


def test_every_parameter_is_read_by_a_stage_and_runtime_by_none(stages, flat):
    listed = {name for stage in stages.values() for name in stage.params}
    assert not any(covers(name.replace(".", "/"), "runtime") for name in listed)
    unread = {
        name
        for name in flat
        if not name.startswith("runtime.")
        and not any(name == entry or name.startswith(f"{entry}.") for entry in listed)
    }
    assert unread == set()


def test_the_real_recipe_is_whole():
    recipe = make_recipe("train", REPOSITORY)
    code = recipe.preimages["code"]["files"]
    assert {"stages/prepare.py", "stages/train.py", "runkey/params/schema.py"} <= set(code)
    assert not any(is_excluded(path) for path in code)
    assert {"lr", "seed"} <= set(recipe.preimages["params"])
    assert not any(name.startswith("runtime") for name in recipe.preimages["params"])
    assert recipe.preimages["data"]["data"].startswith("md5:")
    assert len(recipe.preimages["environment"]["packages"]) > 400
    assert set(recipe.parts) == set(PARTS)
    assert list(recipe.cmd) == ["prepare", "profile_memory", "train"]
