"""`runkey key`: the key of the tree as it stands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.identity.key import PARTS, Recipe, explain, make_recipe

REPOSITORY = Path(__file__).parents[2]


def runkey(*arguments, cwd=REPOSITORY):
    return subprocess.run(
        [sys.executable, "-m", "runkey", "key", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_it_prints_the_key_and_nothing_else():
    done = runkey()
    assert (done.stdout, done.stderr) == (f"{make_recipe('train', REPOSITORY).key}\n", "")
    assert runkey("evaluate").stdout.strip() == make_recipe("evaluate", REPOSITORY).key


def test_json_is_the_recipe_and_hashes_to_its_key():
    stored = json.loads(runkey("--json").stdout)
    assert Recipe.from_dict(stored) == make_recipe("train", REPOSITORY)


def test_an_unknown_stage_is_one_line():
    done = runkey("nothing")
    assert done.returncode == 1
    assert done.stderr == (
        "error: dvc.yaml: no stage nothing;"
        " there are check, prepare, profile_memory, train, evaluate, plots\n"
    )


@pytest.fixture(scope="module")
def recipe():
    return make_recipe("train", REPOSITORY)


def test_explain_shows_all_that_is_in_the_key(recipe):
    lines = list(explain(recipe))
    words = {word for line in lines for word in line.split()}
    assert lines[0] == recipe.key
    assert set(recipe.parts.values()) <= words
    code = recipe.preimages["code"]
    assert {*code["files"], *code["excluded"]} <= words
    assert {sha256[:12] for sha256 in code["files"].values()} <= words
    for name, value in recipe.preimages["params"].items():
        assert f"  {name} = {json.dumps(value)}" in lines
    assert recipe.preimages["data"]["data"] in words
    for name, version, build, content in recipe.preimages["environment"]["packages"]:
        shown = content.removeprefix("sha256:")[:12]
        assert any(line.split() == [shown, name, version, build] for line in lines), name
    headings = [line.split()[0] for line in lines if line[:1] not in ("", " ")]
    assert headings[2:-1] == list(PARTS)


def test_explain_fits_the_width_of_a_page(recipe):
    assert max(map(len, explain(recipe))) <= 100


def test_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom runkey.cli import app\n"
        "sys.argv = ['runkey', 'key']\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print(*{'torch', 'mlflow', 'dvc', 'numpy', 'rich', 'requests', 'git'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == [""]
