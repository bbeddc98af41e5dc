"""Run names and data sets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from runkey.params import Params, parse_params
from runkey.tracking.describe import committed_params, describe_run, read_dataset, run_name

BASE = {"lr": 1e-3, "seed": 0}


def params(**changes: object) -> Params:
    return parse_params(BASE | changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "baseline"),
        ({"lr": 5e-5}, "lr=5e-05"),
        ({"seed": 3, "training": {"epochs": 12}}, "seed=3 epochs=12"),
        ({"model": {"denoising": {"groups": 2}}}, "groups=2"),
        ({"evaluate": {"batch_size": 4}}, "evaluate.batch_size=4"),  # training has one, too
        ({"data": {"group_by_aspect": False}}, "group_by_aspect=false"),
        ({"runtime": {"workers": 3}}, "baseline"),
        (
            {
                "lr": 0.1,
                "seed": 1,
                "model": {"dropout": 0.1, "num_heads": 4, "num_queries": 9},
                "training": {"epochs": 1},
            },
            "lr=0.1 seed=1 num_heads=4 num_queries=9 +2",
        ),
    ],
)
def test_the_name_says_what_differs(changes: dict[str, object], name: str) -> None:
    assert run_name(params(**changes), params()) == name


def test_the_name_has_a_bounded_length() -> None:
    name = run_name(params(data={"path": "x" * 300}), params())
    assert len(name) == 80
    assert name.endswith("…")


def test_without_a_commit_the_defaults_are_the_baseline(tmp_path: Path) -> None:
    assert committed_params(tmp_path) is None
    assert run_name(params(training={"epochs": 7}), None) == "epochs=7"


def commit(folder: Path, params: str) -> None:
    (folder / "params.yaml").write_text(params)
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)


@pytest.mark.parametrize("text", ["lr: [", "lr: 1\nrate: 2\n", "a"])
def test_committed_params_that_cannot_be_read_are_no_baseline(tmp_path: Path, text: str) -> None:
    commit(tmp_path, text)
    assert committed_params(tmp_path) is None


def test_the_baseline_is_what_git_has(tmp_path: Path) -> None:
    commit(tmp_path, "lr: 5e-5\nseed: 4\n")
    (tmp_path / "params.yaml").write_text("lr: 1\nseed: 4\n")
    committed = committed_params(tmp_path)
    assert committed is not None
    assert (committed.lr, committed.seed) == (5e-5, 4)


def test_the_data_set_has_dvcs_digest(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text("outs:\n- md5: abc.dir\n  path: data\n")
    dataset = read_dataset(tmp_path, "data/", {"train_images": 3})
    assert dataset is not None
    assert (dataset["name"], dataset["digest"]) == ("data", "abc.dir")
    assert json.loads(dataset["profile"]) == {"train_images": 3}
    assert read_dataset(tmp_path, "untracked", {}) is None


def test_the_key_and_its_parts_are_params(tmp_path: Path) -> None:
    parts = {"code": "c", "params": "p", "data": "d", "environment": "e"}
    run = describe_run(
        params(), tmp_path, key="rk2-7", parts=parts, tags={"device": "cpu"}, counts={}
    )
    assert run.params["key"] == "rk2-7"
    assert {run.params[f"key.{part}"] for part in parts} == {"c", "p", "d", "e"}
    assert run.params["lr"] == "0.001"
    assert run.params["data.short_sides"] == "[120]"
    assert not [name for name in run.params if name.startswith("runtime.")]
    assert run.tags["device"] == "cpu"
