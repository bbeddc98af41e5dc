"""What changes a key, and what does not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RecipeError
from runkey.identity import code
from runkey.identity import kept as kept_module
from runkey.identity.environment import environment_preimage
from runkey.identity.key import (
    PARTS,
    Recipe,
    make_recipe,
    older_rule,
    part_digest,
    short_key,
)

REPOSITORY = Path(__file__).parents[2]


def edit(project, name, old, new):
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new))


def changed_parts(project, change, stage="train"):
    """The parts that differ after `change`; the key must differ exactly if one of them does."""
    before = make_recipe(stage, project)
    change()
    after = make_recipe(stage, project)
    parts = {part for part in PARTS if before.parts[part] != after.parts[part]}
    assert (before.key != after.key) == bool(parts)
    return parts


def section(text):
    """An edit that puts a section before `model`."""
    return "model:", f"{text}\nmodel:"


CHANGES = {
    "a file reached by import": ("runkey/model/deep/layer.py", "3", "4", {"code"}),
    "a comment in such a file": ("runkey/model/net.py", "from", "# why\nfrom", set()),
    "a docstring": ("runkey/late.py", "", '"""Why."""\n', set()),
    "an import inside a function": ("runkey/late.py", "", "x = 1\n", {"code"}),
    "a package's init file": ("runkey/model/__init__.py", "", "x = 1\n", {"code"}),
    "code of an upstream stage only": ("runkey/data/boxes.py", "*", "x", {"code"}),
    "a file nobody imports": ("runkey/unused.py", "", "x = 1\n", set()),
    "telemetry": ("runkey/tracking/log.py", "unused", "late", set()),
    "a later stage": ("stages/evaluate.py", "width", "width as w", set()),
    "a test": ("tests/test_net.py", "net", "net as n", set()),
    "the README": ("README.md", "A", "The", set()),
    "a listed parameter": ("params.yaml", "1e-4", "2e-4", {"params"}),
    "the way a number is written": ("params.yaml", "1e-4", "0.0001", set()),
    "a default that is written out": ("params.yaml", *section("optimizer: {beta1: 0.9}"), set()),
    "a default that is changed": ("params.yaml", *section("optimizer: {beta1: 0.8}"), {"params"}),
    "a parameter of an upstream stage": (
        "params.yaml",
        *section("data: {val_fraction: 0.3}"),
        {"params"},
    ),
    "a parameter of a later stage": ("params.yaml", *section("evaluate: {batch_size: 3}"), set()),
    "runtime": ("params.yaml", *section("runtime: {workers: 3, device: cpu, log_every: 7}"), set()),
    "the data": ("data.dvc", "0123", "4567", {"data"}),
    "the size in data.dvc": ("data.dvc", "- md5", "- size: 7\n  md5", set()),
    "a locked build": (
        "conda-lock.yml",
        "linux-64/numpy-2.10-py312_0",
        "linux-64/numpy-2.10-py312_1",
        {"environment"},
    ),
    "a locked hash": ("conda-lock.yml", "sha256: '22'", "sha256: '23'", {"environment"}),
    "an md5 beside a sha256": ("conda-lock.yml", "md5: '11'", "md5: '12'", set()),
    "another platform's package": ("conda-lock.yml", "sha256: '55'", "sha256: '56'", set()),
    "a comment in the lock": ("conda-lock.yml", "version: 1\n", "# by hand\nversion: 1\n", set()),
    "a field that the key does not know": (
        "conda-lock.yml",
        "linux-64\n  dependencies: {}",
        "linux-64\n  x: 1\n  dependencies: {}",
        set(),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reaches_the_key_only_where_it_should(project, name):
    file, old, new, parts = CHANGES[name]

    def change():
        if old:
            edit(project, file, old, new)
        else:
            (project / file).write_text(new)

    assert changed_parts(project, change) == parts


def test_a_version_is_text_and_no_number(project):
    """2.10 read as a number would be 2.1."""
    packages = make_recipe("train", project).preimages["environment"]["packages"]
    assert packages == [
        ["libjpeg-turbo", "3.1.2", "h_1", "md5:33"],
        ["numpy", "2.10", "py312_0", "sha256:22"],
    ]
    other = environment_preimage(project / "conda-lock.yml", "osx-arm64")
    own = make_recipe("train", project).parts["environment"]
    assert part_digest("environment", other) != own


def test_the_command_is_in_the_key_and_so_are_those_before_it(project):
    before = make_recipe("train", project)
    edit(project, "dvc.yaml", "stages.prepare\n", "stages.prepare --fast\n")
    after = make_recipe("train", project)
    assert before.parts == after.parts
    assert before.key != after.key
    assert after.cmd == {
        "prepare": "python -m stages.prepare --fast",
        "train": "python -m stages.train",
    }


def test_the_exclude_list_is_hashed(project, monkeypatch):
    with_list = make_recipe("prepare", project)
    monkeypatch.setattr("runkey.identity.key.EXCLUDED", ())
    without = make_recipe("prepare", project)
    assert with_list.preimages["code"]["files"] == without.preimages["code"]["files"]
    assert with_list.key != without.key


def test_neither_commits_nor_outputs_nor_the_folder_matter(project, tmp_path_factory):
    before = make_recipe("train", project)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", *identity, *command], cwd=project, check=True)
    (project / "prepared").mkdir()
    (project / "prepared/train.json").write_text("[]")
    (project / "dvc.lock").write_text("schema: '2.0'\n")
    assert make_recipe("train", project) == before
    elsewhere = tmp_path_factory.mktemp("other") / "clone"
    subprocess.run(["git", "clone", "-q", str(project), str(elsewhere)], check=True)
    assert make_recipe("train", elsewhere).key == before.key


def test_the_data_may_lie_elsewhere(project):
    before = make_recipe("train", project)
    (project / "sets").mkdir()
    (project / "sets/balls.dvc").write_text("outs:\n- md5: 0123abcd.dir\n  path: balls\n")
    edit(project, "params.yaml", "model:", "data: {path: sets/balls}\nmodel:")
    (project / "data.dvc").unlink()
    edit(project, "dvc.yaml", "deps: [data,", "deps: ['${data.path}',")
    assert make_recipe("train", project) == before


def test_a_weights_file_counts_by_its_content(project):
    edit(project, "params.yaml", "model:\n", "model:\n  init_from: start.pt\n")
    with pytest.raises(RecipeError, match=r"model.init_from = start.pt: no such file"):
        make_recipe("train", project)
    (project / "start.pt").write_bytes(b"one")
    assert changed_parts(project, lambda: (project / "start.pt").write_bytes(b"two")) == {"params"}
    before = make_recipe("train", project)
    (project / "start.pt").rename(project / "moved.pt")
    edit(project, "params.yaml", "start.pt", "moved.pt")
    assert make_recipe("train", project) == before


def test_a_declared_file_that_is_no_python_is_code(project):
    edit(project, "dvc.yaml", "deps: [prepared/train.json", "deps: [table.csv, prepared/train.json")
    (project / "table.csv").write_text("1,2\n")
    assert changed_parts(project, lambda: (project / "table.csv").write_text("1,3\n")) == {"code"}


def test_stages_of_one_code_have_keys_of_their_own(project):
    assert len({make_recipe(stage, project).key for stage in ("prepare", "train", "evaluate")}) == 3


def test_the_shape_of_a_key_and_its_round_trip(project):
    recipe = make_recipe("train", project)
    assert re.fullmatch(r"rk2-[0-9a-f]{64}", recipe.key)
    assert short_key(recipe.key) == recipe.key[:16]
    stored = json.loads(json.dumps(recipe.as_dict()))
    assert Recipe.from_dict(stored).key == recipe.key
    assert recipe.preimages["params"]["lr"] == 1e-4
    assert recipe.preimages["data"] == {"data": "md5:0123abcd.dir"}
    stored["preimages"]["params"]["lr"] = 2e-4
    with pytest.raises(RecipeError, match="do not hash to its key"):
        Recipe.from_dict(stored)
    with pytest.raises(RecipeError, match="schema 'rk0'"):
        Recipe.from_dict({**stored, "schema": "rk0"})
    with pytest.raises(RecipeError, match=r"key\.json: Out of range float"):
        Recipe.from_dict({**stored, "cmd": {"train": float("nan")}})
    for schema in ("rk1", "rk2"):
        with pytest.raises(RecipeError, match="lacks 'stage'"):
            Recipe.from_dict({"schema": schema})


OLDER = {
    "schema": "rk1",
    "key": "rk1-c7fa2bdff1e1617ea149bb6ec4bca667e3afff320b527b162fd7aa84dd988455",
    "stage": "train",
    "cmd": {"train": "python -m stages.train"},
    "parts": {
        "code": "97bacc227b42a58050ec594aec818012620591cfd74a0961dc447bd37fdeafb7",
        "params": "defa9ebd822bbac1d70b2d8bb3860cf9eff6a228ad4eab837dd298458e41702d",
        "data": "42b99ce4a6ac54922d8651820ad618b65a43f15a08870f6b46c0936f28e38401",
        "environment": "e3f92af27aace806c7a9fedab84ac5e16a1e5827567c2f30c67b0756974118fc",
    },
    "preimages": {
        "code": {
            "files": {"stages/train.py": "ab" * 32},
            "excluded": ["runkey/cli/"],
        },
        "params": {"lr": 0.1},
        "data": {"data": "md5:01.dir"},
        "environment": {"platform": "linux-64", "packages": []},
    },
}


def test_a_recipe_of_the_older_rule_keeps_its_key():
    """key.json of a run from before `rk2`, written by the code of then."""
    recipe = Recipe.from_dict(OLDER)
    assert (recipe.schema, recipe.key) == ("rk1", OLDER["key"])
    assert recipe.as_dict() == OLDER
    assert older_rule(recipe.key) == "key by the older rule rk1 (bytes of the code)"
    with pytest.raises(RecipeError, match="do not hash to its key"):
        Recipe.from_dict({**OLDER, "schema": "rk2"})


def test_code_hashed_by_an_unknown_rule_is_refused(project):
    recipe = make_recipe("train", project)
    assert older_rule(recipe.key) == ""
    code = {**recipe.preimages["code"], "rule": "ast9"}
    later = Recipe("train", recipe.cmd, {**recipe.preimages, "code": code})
    with pytest.raises(RecipeError, match="code by rule 'ast9'; this runkey reads ast1, bytes"):
        Recipe.from_dict(later.as_dict())


def test_equal_contents_of_two_parts_hash_differently(project):
    recipe = make_recipe("train", project)
    same = Recipe("train", recipe.cmd, {part: {"a": "b"} for part in PARTS})
    assert len(set(same.parts.values())) == len(PARTS)


RUN = "stages: {train: {cmd: python -m stages.train, %s}}"
CIRCLE = RUN.replace("}}", "}, b: {cmd: x, deps: [a/c], outs: [b]}}") % "deps: [b], outs: [a]"
SCRIPT = "stages: {train: {cmd: python stages/train.py}}"
FAULTS = {
    "no pipeline": ("dvc.yaml", None, "dvc.yaml: not found in "),
    "no yaml": ("dvc.yaml", "a: ]", "dvc.yaml: not YAML at line 1"),
    "no stages": ("dvc.yaml", "vars: []\n", "dvc.yaml: holds no stages"),
    "no such stage": (
        "dvc.yaml",
        "stages: {prepare: {cmd: python -m stages.prepare}}",
        "dvc.yaml: no stage train; there are prepare",
    ),
    "no command": (
        "dvc.yaml",
        "stages: {train: {cmd: [a, b]}}",
        "dvc.yaml: stage train has no single `cmd`",
    ),
    "a script": (
        "dvc.yaml",
        SCRIPT,
        "dvc.yaml: stage train runs `python stages/train.py`, not `python -m <module>`,",
    ),
    "a circle": ("dvc.yaml", CIRCLE, "dvc.yaml: stage train depends on its own outputs"),
    "unknown parameter": (
        "dvc.yaml",
        RUN % "params: [rate]",
        "dvc.yaml: stage train lists rate, no name in params.yaml",
    ),
    "another parameter file": (
        "dvc.yaml",
        RUN % "params: [{a.yaml: [x]}]",
        "dvc.yaml: stage train lists params {'a.yaml': ['x']}; only params.yaml is read",
    ),
    "unknown template": (
        "dvc.yaml",
        "stages: {train: {cmd: 'python -m ${x.y}'}}",
        "dvc.yaml: stage train uses ${x.y}, no value of params.yaml",
    ),
    "a missing dependency": (
        "dvc.yaml",
        RUN % "deps: [gone]",
        "dvc.yaml: gone is a dependency and does not exist",
    ),
    "data not tracked": (
        "data.dvc",
        None,
        "params.yaml: data.path = data is not tracked; `dvc add data`",
    ),
    "a broken .dvc file": (
        "data.dvc",
        "outs: []",
        "data.dvc: holds no md5 of data; `dvc add data` writes it",
    ),
    "a missing module": (
        "dvc.yaml",
        "stages: {train: {cmd: python -m stages.gone}}",
        "stages.gone: no such module in the repository; see `cmd` in dvc.yaml",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_missing_is_named_in_one_line(project, name):
    file, text, message = FAULTS[name]
    if text is None:
        (project / file).unlink()
    else:
        (project / file).write_text(text)
    with pytest.raises(RecipeError) as caught:
        make_recipe("train", project)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_parameters_listed_under_the_files_name(project):
    before = make_recipe("train", project)
    edit(
        project,
        "dvc.yaml",
        "params: [lr, seed, model, optimizer]",
        "params: [lr, {params.yaml: [seed, model, optimizer]}]",
    )
    assert make_recipe("train", project) == before


def test_a_key_is_known_without_torch_mlflow_or_dvc():
    code = (
        "import sys, runkey.identity.key, runkey.identity.record\n"
        "print(*{'torch', 'mlflow', 'dvc', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", [".table.json", ".cache/table.json", "sub/old.pyc", "x.so"])
def test_every_file_in_a_declared_folder_that_dvc_depends_on_counts(project, name):
    before = make_recipe("train", project).key
    path = project / "runkey/data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("1")
    key = make_recipe("train", project).key
    path.write_text("2")
    assert len({before, key, make_recipe("train", project).key}) == 3


@pytest.mark.parametrize(
    "name", [".DS_Store", "._x.py", ".net.py.swp", ".gitignore", "__pycache__/a.pyc"]
)
def test_what_tools_leave_behind_does_not(project, name):
    before = make_recipe("train", project).key
    path = project / "runkey/data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("1")
    assert make_recipe("train", project).key == before


@pytest.mark.parametrize("path", ["./data", "data/", ".//data"])
def test_every_spelling_of_the_data_folder_gives_the_same_key(project, path):
    before = make_recipe("train", project).key
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(f"{text}data: {{path: {path}}}\n")
    assert make_recipe("train", project).key == before


@pytest.fixture
def kept(project):
    """The file of the digests that a first look at the code left."""
    forget()
    make_recipe("train", project)
    return project / ".runkey/kept.json"


def forget():
    code._read.cache_clear()
    kept_module._values.clear()


def test_code_that_was_hashed_before_is_not_parsed_again(project, kept, monkeypatch):
    first = make_recipe("train", project)
    forget()
    monkeypatch.setattr(code, "_parse", lambda path, _: pytest.fail(f"{path} is parsed"))
    assert make_recipe("train", project) == first


def test_only_what_changed_is_parsed_again(project, kept, monkeypatch):
    edit(project, "runkey/model/net.py", "import width", "import width\nx = 1")
    forget()
    parsed, parse = [], code._parse
    monkeypatch.setattr(
        code, "_parse", lambda path, data: (parsed.append(path), parse(path, data))[1]
    )
    changed = make_recipe("train", project)
    assert parsed == ["runkey/model/net.py"]
    kept.unlink()
    forget()
    assert make_recipe("train", project) == changed


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a digest changed": lambda text: re.sub(
        r'"[0-9a-f]{64}",\n', f'"{"0" * 64}",\n', text, count=1
    ),
    "of another rule": lambda text: re.sub(r'"check": "\w+"', f'"check": "{"0" * 64}"', text),
    "no object": lambda text: "[1, 2]",
    "not UTF-8": lambda text: "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_digests_changes_no_key(project, kept, damage):
    first, text = make_recipe("train", project), kept.read_text()
    kept.write_bytes(DAMAGES[damage](text).encode(errors="surrogateescape"))
    assert kept.read_text(errors="replace") != text
    forget()
    assert make_recipe("train", project) == first
    assert kept.read_text() == text


def test_a_folder_that_takes_no_file_of_digests_has_the_same_key(project, kept):
    first = make_recipe("train", project)
    kept.unlink()
    kept.mkdir()
    forget()
    assert make_recipe("train", project) == first
