"""The key of this very repository, changed in one place after the other."""

import os
import shutil
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import ParamsError
from runkey.identity.code import EXCLUDED, is_excluded
from runkey.identity.dvc_yaml import chain, read_pipeline
from runkey.identity.environment import environment_preimage
from runkey.identity.key import DATA_PATH, FILE_PARAMS, PARTS, make_recipe, short_key
from runkey.params import Params, load_params, parse_params

REPOSITORY = Path(__file__).parents[2]
INPUTS = ("params.yaml", "dvc.yaml", "data.dvc", "conda-lock.yml")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without its data; its lock is cut to three packages, for speed."""
    root = tmp_path_factory.mktemp("key") / "repository"
    root.mkdir()
    for folder in ("runkey", "stages", "tests", "docs", "environment"):
        shutil.copytree(
            REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in (*INPUTS, "README.md", "Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(REPOSITORY / name, root)
    return root


@pytest.fixture(scope="module")
def small(copy, tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "repository"
    shutil.copytree(copy, root)
    text = (root / "conda-lock.yml").read_text()
    (root / "conda-lock.yml").write_text(text[: text.index("- name: aiobotocore")])
    return root


@pytest.fixture(scope="module")
def recipe(copy):
    return make_recipe("train", copy)


def changed(before, after):
    """The parts that differ; the key must differ exactly if one of them does."""
    parts = {part for part in PARTS if before.parts[part] != after.parts[part]}
    assert (before.key != after.key) == bool(parts)
    return parts


# --- code


def test_an_edit_of_any_file_that_training_reaches_gives_a_key_of_its_own(small):
    params = load_params(small / "params.yaml")
    before = make_recipe("train", small, params)
    keys = {before.key}
    files = before.preimages["code"]["files"]
    for path in files:
        content = (small / path).read_bytes()
        (small / path).write_bytes(content + b"\nchanged = 1\n")
        after = make_recipe("train", small, params)
        assert changed(before, after) == {"code"}, path
        keys.add(after.key)
        (small / path).write_bytes(content)
    assert len(keys) == len(files) + 1 > 60
    assert make_recipe("train", small, params) == before


def test_a_comment_or_a_docstring_in_such_a_file_does_not_count(small):
    path = small / "runkey/model/detr.py"
    before, content = make_recipe("train", small), path.read_bytes()
    path.write_bytes(b'"""Why."""\n' + content + b"# why\n")
    assert make_recipe("train", small) == before
    path.write_bytes(content)


def test_errors_and_progress_reporting_do_not_count(recipe):
    files = set(recipe.preimages["code"]["files"])
    assert not {"runkey/errors.py", "runkey/progress.py", "runkey/training/progress.py"} & files


def test_all_other_files_may_change_at_will(copy, recipe, tmp_path):
    """README, tests, telemetry, command line, registry, later stages: all of them at once."""
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    edited = []
    for path in sorted(other.rglob("*")):
        name = path.relative_to(other).as_posix()
        if path.is_file() and name not in recipe.preimages["code"]["files"] and name not in INPUTS:
            path.write_bytes(path.read_bytes() + b"\n# changed\n")
            edited.append(name)
    assert {"README.md", "stages/evaluate.py", "runkey/registry/library.py"} <= set(edited)
    assert {f"tests/identity/{Path(__file__).name}", "runkey/identity/key.py"} <= set(edited)
    assert make_recipe("train", other) == recipe


def test_what_the_exclude_list_leaves_out_is_nothing_that_computes():
    """A new folder is on one side or the other, by decision."""
    folders = {f"runkey/{path.parent.name}/" for path in REPOSITORY.glob("runkey/*/__init__.py")}
    computing = {"data", "evaluation", "inference", "memory", "model", "params", "training"}
    computing |= {"pipeline"}  # but for the files that look up and record
    assert folders - set(EXCLUDED) == {f"runkey/{name}/" for name in computing}
    stages = {"prepare", "profile_memory", "train"}
    code = set(make_recipe("train", REPOSITORY).preimages["code"]["files"])
    assert {f"stages/{name}.py" for name in stages} <= code
    assert not any(is_excluded(path) for path in code)


# --- parameters


def literals(annotation):
    """The strings and numbers of every Literal in a type."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [value for inner in typing.get_args(annotation) for value in literals(inner)]


def annotation_of(name):
    model = Params
    for part in name.split("."):
        annotation = model.model_fields[part].annotation
        model = annotation
    return annotation


def candidates(name, value):
    """Other values for a parameter, likely ones first; the schema says which are valid."""
    yield from (other for other in literals(annotation_of(name)) if other != value)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value - 1, value * 0.5, value + 0.125, value * 2)
    elif isinstance(value, list):
        yield from ([*value, 640], value[:-1], [number + 1 for number in value])
    yield from (
        1,
        0.5,
        [0, 2047],
        [8],
        "weights.pt" if name in FILE_PARAMS else "val/AP50",
        "http://a.example",
        r"(video\d+)_",
    )


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return tree


def with_another_value(params, name):
    """The parameters with one value changed to the first other one that is valid; None: none."""
    flat = params.flat(runtime=True)
    for value in candidates(name, flat[name]):
        try:
            other = parse_params(nested({**flat, name: value}))
        except ParamsError:
            continue
        differing = {n for n, v in other.flat(runtime=True).items() if v != flat[n]}
        if differing == {name}:
            return other
    return None


# Some values are free only beside others: dilation with a ResNet, milestones with that schedule.
STARTS = [load_params(path) for path in sorted(REPOSITORY.glob("presets/*.yaml"))]


def test_every_parameter_that_training_reads_and_no_other_is_in_its_key(small):
    (small / "weights.pt").write_bytes(b"weights")
    listed = {
        name
        for stage in chain(read_pipeline(small, STARTS[0].flat()), "train")
        for name in stage.params
    }
    befores = [make_recipe("train", small, start) for start in STARTS]
    read, unread, keys = [], [], {recipe.key for recipe in befores}
    assert len(keys) == len(STARTS)
    for name in STARTS[0].flat(runtime=True):
        if name == DATA_PATH:
            continue  # where the data lie is in no key; what lies there is
        others = (with_another_value(start, name) for start in STARTS)
        before, other = next(pair for pair in zip(befores, others, strict=True) if pair[1])
        after = make_recipe("train", small, other)
        counts = any(name == entry or name.startswith(f"{entry}.") for entry in listed)
        assert changed(before, after) == ({"params"} if counts else set()), name
        (read if counts else unread).append(name)
        keys.add(after.key)
    assert len(keys) == len(read) + len(STARTS) > 80
    assert {name.split(".")[0] for name in unread} == {"evaluate", "runtime"}


def test_the_file_gives_the_key_that_its_values_give(copy, recipe):
    assert make_recipe("train", copy, load_params(copy / "params.yaml")) == recipe


# --- data and environment


def edited(root, tmp_path, name, old, new):
    other = tmp_path / "edited"
    shutil.copytree(root, other)
    text = (other / name).read_text()
    assert old in text
    (other / name).write_text(text.replace(old, new, 1))
    return other


def test_other_data_are_another_key(copy, recipe, tmp_path):
    md5 = recipe.preimages["data"]["data"].removeprefix("md5:")
    other = edited(copy, tmp_path, "data.dvc", md5, "0" * 32 + ".dir")
    assert changed(recipe, make_recipe("train", other)) == {"data"}


ENTRY = """\
- name: numpy
  version: {version}
  manager: conda
  platform: osx-arm64
  dependencies: {{}}
  url: https://channel.example/osx-arm64/numpy-{version}-py312_0.conda
  hash:
    md5: '00'
    sha256: '{version}'
  category: main
  optional: false
"""


@pytest.mark.parametrize("name", ["numpy", "libtorch", "tzdata"])
@pytest.mark.parametrize("what", ["version", "build", "hash"])
def test_another_version_build_or_hash_of_a_locked_package(copy, recipe, tmp_path, name, what):
    rows = {row[0]: row for row in recipe.preimages["environment"]["packages"]}
    _, version, build, content = rows[name]
    text = (copy / "conda-lock.yml").read_text()
    start = text.index(f"- name: {name}\n")
    entry = text[start : text.index("\n- name: ", start)]
    if what == "hash":
        new = entry.replace(content.removeprefix("sha256:"), "f" * 64)
    elif what == "build":
        new = entry.replace(f"-{build}.", f"-{build}9.")
    else:
        new = entry.replace(version, f"{version}9")
    assert new != entry
    other = edited(copy, tmp_path, "conda-lock.yml", entry, new)
    assert changed(recipe, make_recipe("train", other)) == {"environment"}


def test_what_else_the_lock_says_and_other_platforms_do_not_count(copy, recipe, tmp_path):
    other = edited(copy, tmp_path, "conda-lock.yml", "used_env_vars: []", "used_env_vars: [A]")
    lock = other / "conda-lock.yml"
    lock.write_text("# by hand\n" + lock.read_text() + ENTRY.format(version="2.0"))
    assert make_recipe("train", other) == recipe
    lock.write_text(lock.read_text() + ENTRY.format(version="2.1"))
    assert make_recipe("train", other) == recipe
    packages = environment_preimage(lock, "osx-arm64")
    there = replace(recipe, preimages={**recipe.preimages, "environment": packages})
    assert changed(recipe, there) == {"environment"}


# --- what is around it


def test_neither_times_nor_the_folder_nor_who_looks_matter(copy, recipe, tmp_path, monkeypatch):
    moved = tmp_path / "a folder" / "elsewhere"
    shutil.copytree(copy, moved)
    for number, path in enumerate(sorted(moved.rglob("*"))):
        os.utime(path, (1_000_000_000 + number, 1_500_000_000 - number))
    monkeypatch.chdir(moved / "runkey")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert make_recipe("train", moved) == recipe
    assert make_recipe("train", Path("..")) == recipe


def test_the_stage_says_the_key_that_the_command_says(copy):
    """Its first line, before it looks for prepared data, which this copy does not have."""
    stage = subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=copy,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "MLFLOW_TRACKING_URI")},
    )
    try:
        assert stage.stdout
        line = stage.stdout.readline()
    finally:
        stage.kill()
        stage.wait()
        stage.stdout.close()
    command = subprocess.run(
        [sys.executable, "-m", "runkey", "key"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=True,
    )
    key = command.stdout.strip()
    assert key == make_recipe("train", copy).key
    assert line.startswith(f"key {short_key(key)}")
