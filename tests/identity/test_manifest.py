"""run.json and the witness in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from runkey.errors import RecipeError
from runkey.identity.key import make_recipe
from runkey.identity.record import (
    KERNEL_VARIABLES,
    Hardware,
    RunManifest,
    capture_environment,
    describe_cpu,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def manifest(project):
    recipe = make_recipe("train", project)
    hardware = Hardware(device="cpu x86_64", micro_batch=4, world_size=1, threads=2)
    witness = capture_environment(REPOSITORY, recipe, hardware)
    return RunManifest(
        key=recipe.key, stage=recipe.stage, parts=recipe.parts, run_id="0a1b", witness=witness
    )


def test_what_is_written_is_read(manifest, tmp_path):
    manifest.write(tmp_path / "new" / "run.json")
    assert RunManifest.read(tmp_path / "new" / "run.json") == manifest
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]
    stored = json.loads((tmp_path / "new" / "run.json").read_text())
    assert stored["key"].startswith("rk2-")
    assert stored["run_id"] == "0a1b"


def test_a_write_that_fails_leaves_the_old_file(manifest, tmp_path):
    path = tmp_path / "run.json"
    manifest.write(path)
    before = path.read_bytes()
    broken = RunManifest(
        key=manifest.key,
        stage="train",
        parts={"code": float("nan")},
        run_id=None,
        witness=manifest.witness,
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.write(path)
    assert path.read_bytes() == before


def test_the_witness_says_what_was_there(manifest):
    witness = manifest.witness
    assert witness.packages["numpy"] == numpy.__version__
    assert "runkey/identity/record.py" in witness.files
    # This process imported no file of the tmp project's recipe, and its own count as undeclared.
    assert "runkey/paths.py" in witness.files
    assert "runkey/identity/record.py" not in witness.undeclared_files
    assert witness.interpreter.startswith("CPython 3.12")


def test_the_witness_names_the_commit_and_whether_the_tree_is_clean(project):
    recipe = make_recipe("train", project)

    def witness():
        hardware = Hardware(device="cpu", micro_batch=1, world_size=1, threads=1)
        return capture_environment(project, recipe, hardware)

    assert witness().commit is None
    assert witness().dirty is False
    assert witness().package_differences == [
        "requirements.txt: not found; `git checkout requirements.txt` restores it"
    ]
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", *identity, *command], cwd=project, check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert (witness().commit, witness().dirty) == (commit, False)
    (project / "README.md").write_text("changed")
    assert witness().dirty is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "run.json: not found; `dvc repro train` writes it"),
        (
            "{",
            "run.json: not a run's manifest (not JSON (line 1, column 2: ",
        ),
        (
            "[]",
            "run.json: not a run's manifest (Input should be a dictionary or ",
        ),
        ('{"schema": "run1", "key": "rk2-0"}', "run.json: not a run's manifest"),
        ('{"schema": "run0"}', "run.json: schema 'run0'; this runkey reads run1"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("run.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        RunManifest.read(Path("run.json"))
    assert str(caught.value).startswith(message)


def test_the_witness_keeps_variables_that_libraries_read_and_no_others(project, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    recipe = make_recipe("train", project)
    hardware = Hardware(device="cpu", micro_batch=1, world_size=1, threads=3)
    witness = capture_environment(project, recipe, hardware)
    assert witness.variables["OMP_NUM_THREADS"] == "3"
    assert witness.variables["PYTHONPATH"] == "somewhere"
    assert "secret" not in witness.variables.values()


DESCRIBE = """
import torch
from runkey.identity.record import describe_cpu
print(describe_cpu(torch.backends.cpu.get_cpu_capability()))
numbers = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
print(torch.softmax(numbers, 1).exp().sum(1).tolist())
"""


@pytest.fixture
def plain_shell(monkeypatch):
    """None of this shell's variables chooses kernels."""
    for name in os.environ:
        if name.startswith(KERNEL_VARIABLES):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("plain_shell")
def test_the_instructions_that_torch_uses_are_in_the_class():
    """In real processes: what torch takes from its variable changes the last bits."""
    told = {}
    for name, value in [("ATEN_CPU_CAPABILITY", "default"), ("OMP_WAIT_POLICY", "PASSIVE")]:
        done = subprocess.run(
            [sys.executable, "-c", DESCRIBE],
            cwd=REPOSITORY,
            env={**os.environ, name: value, "MKL_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        told[name] = done.stdout.splitlines()
    plain, other = told["OMP_WAIT_POLICY"], told["ATEN_CPU_CAPABILITY"]
    assert other[0].startswith("DEFAULT: ")
    assert other[0].endswith("), ATEN_CPU_CAPABILITY=default")
    assert plain[0].endswith(")")  # threads are a field of their own
    if plain[0].startswith("DEFAULT: "):
        pytest.skip("a CPU without vector instructions")
    assert other[1] != plain[1]


@pytest.mark.usefixtures("plain_shell")
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR"])
def test_a_variable_that_chooses_kernels_is_in_the_class(monkeypatch, name):
    before = describe_cpu("AVX2")
    monkeypatch.setenv(name, "SSE41")
    assert describe_cpu("AVX2") == f"{before}, {name}=SSE41"
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    assert describe_cpu("AVX2") == f"{before}, {name}=SSE41"
