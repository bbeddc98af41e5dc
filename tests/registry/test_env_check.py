"""`runkey env check`: what is installed against what is locked."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.environment import EXTRAS, installed_packages, read_lock
from runkey.registry.environment import PackageDifference, compare_environment

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository with the real lists; no conda environment is active."""
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    (tmp_path / "stages").mkdir()
    for name in ("conda-lock.yml", "requirements.txt", "params.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def edit(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def check(folder, *arguments):
    outside = {k: v for k, v in os.environ.items() if k not in ("CONDA_PREFIX", "DVC_ROOT")}
    return subprocess.run(
        [sys.executable, "-m", "runkey", "env", "check", *arguments],
        cwd=folder,
        env={**outside, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def test_what_is_missing_other_and_extra_is_named_and_answered_no(folder):
    numpy = importlib.metadata.version("numpy")
    edit(folder, "requirements.txt", f"numpy=={numpy} ", "numpy==0.1 ")
    edit(folder, "requirements.txt", "sortedcontainers==", "no-such-thing==")
    done = check(folder)
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith(" against requirements.txt")
    assert lines[1].startswith("Python 3.12.")
    assert max(map(len, lines[1:])) <= 100  # the first holds the environment's path
    count = len(installed_packages()) - 2
    assert lines[2] == f"{count} as locked, 1 missing, 1 of another version, 1 extra"
    assert "  missing  no-such-thing 2.4.0" in lines
    assert f"  other    numpy: locked 0.1, installed {numpy}" in lines
    assert "  extra    sortedcontainers 2.4.0" in lines
    assert lines[-1] == "to mend it: make env, then .venv/bin/runkey"
    told = json.loads(check(folder, "--json").stdout)
    assert told["agrees"] is False
    assert told["other"] == [{"name": "numpy", "locked": "0.1", "installed": numpy}]
    assert [item["name"] for item in told["missing"] + told["extra"]] == [
        "no-such-thing",
        "sortedcontainers",
    ]


def test_another_build_of_the_same_torch_is_a_fault(folder):
    """A wheel for another CUDA, or for none, has the same version."""
    edit(folder, "requirements.txt", "nvidia-cuda-runtime-cu12==12.8.", "# nvidia-")
    found = compare_environment(folder)
    installed = f"for CUDA {found.cuda}"
    assert found.other == [PackageDifference("torch's build", "for the CPU", installed)]
    assert not found.agrees


def test_extra_packages_alone_are_no_fault(folder):
    edit(folder, "requirements.txt", "sortedcontainers==2.4.0", "# was here: sortedcontainers")
    found = compare_environment(folder)
    assert found.extra == [PackageDifference("sortedcontainers", None, "2.4.0")]
    assert found.agrees
    assert found.as_dict()["way_out"] == ""


def test_another_minor_version_of_python_is_a_fault(folder):
    edit(
        folder,
        "conda-lock.yml",
        "- name: python\n  version: 3.12",
        "- name: python\n  version: 3.9",
    )
    found = compare_environment(folder)
    assert [d.name for d in found.other] == ["python"]


def test_lists_that_are_gone_are_one_line(folder):
    (folder / "requirements.txt").unlink()
    done = check(folder)
    assert done.returncode == 1
    assert done.stderr.startswith("error: requirements.txt: not found; ")
    assert len(done.stderr.splitlines()) == 1


def test_the_way_out_of_the_repositorys_own_environment_removes_its_mark(folder, monkeypatch):
    edit(folder, "requirements.txt", "sortedcontainers==", "no-such-thing==")
    monkeypatch.setattr(sys, "prefix", str(folder / ".venv"))
    found = compare_environment(folder)
    assert found.way_out == "rm -f .venv/requirements.installed && make env"


# --- conda


@pytest.fixture
def conda(folder, monkeypatch):
    """The active environment's folder with conda's record of every locked package."""
    prefix = folder / "conda"
    (prefix / "conda-meta").mkdir(parents=True)
    for package in read_lock(folder / "conda-lock.yml"):
        write_record(prefix, package.name, package.version, package.build)
    monkeypatch.setenv("CONDA_PREFIX", str(prefix))
    monkeypatch.setattr(sys, "prefix", str(prefix))
    return prefix


def write_record(prefix, name, version, build):
    dist_info = f"lib/python3.12/site-packages/{name}-{version}.dist-info"
    (prefix / dist_info).mkdir(parents=True, exist_ok=True)
    record = {"name": name, "version": version, "build": build, "files": [f"{dist_info}/METADATA"]}
    (prefix / "conda-meta" / f"{name}.json").write_text(json.dumps(record))


def test_a_conda_environment_as_locked_agrees(folder, conda):
    found = compare_environment(folder)
    assert found.against == "conda-lock.yml"
    assert (found.missing, found.other, found.extra) == ([], [], [])
    assert found.same == len(read_lock(folder / "conda-lock.yml"))


def test_another_build_of_the_same_version_is_another_package(folder, conda):
    libtorch = next(p for p in read_lock(folder / "conda-lock.yml") if p.name == "libtorch")
    write_record(conda, "libtorch", libtorch.version, "cpu_mkl_0")
    (conda / "conda-meta/zstd.json").unlink()
    next(conda.glob("lib/python3.12/site-packages/zstd-*")).rmdir()
    write_record(conda, "extra-thing", "1.0", "0")
    found = compare_environment(folder)
    assert found.other == [
        PackageDifference(
            "libtorch", f"{libtorch.version} {libtorch.build}", f"{libtorch.version} cpu_mkl_0"
        )
    ]
    assert [d.name for d in found.missing] == ["zstd"]
    assert found.extra == [PackageDifference("extra-thing", None, "1.0 0")]
    assert not found.agrees
    assert found.way_out == f"conda-lock install --prefix {conda} conda-lock.yml"


def test_what_pip_put_over_conda_is_seen(folder, conda):
    """conda's own record still says the locked version; Python imports the other."""
    numpy = next(p for p in read_lock(folder / "conda-lock.yml") if p.name == "numpy")
    site = conda / "lib/python3.12/site-packages"
    (site / f"numpy-{numpy.version}.dist-info").rmdir()
    (site / "numpy-9.9.dist-info").mkdir()
    (site / "My_Own-0.1.dist-info").mkdir()
    (site / "runkey-0.1.dist-info").mkdir()  # this project, in editable form
    found = compare_environment(folder)
    assert found.other == [PackageDifference("numpy", numpy.version, "9.9 by pip")]
    assert found.extra == [PackageDifference("my-own", None, "0.1 by pip")]


def test_a_damaged_record_is_named(folder, conda):
    (conda / "conda-meta/numpy.json").write_text("{")
    with pytest.raises(RegistryError, match=r"numpy\.json: not a record of conda's"):
        compare_environment(folder)


def test_a_conda_environment_that_is_not_this_interpreters_is_not_looked_at(
    folder, conda, monkeypatch
):
    monkeypatch.setattr(sys, "prefix", str(folder / ".venv"))
    found = compare_environment(folder)
    assert found.against == "requirements.txt"


def test_packages_of_exports_are_not_this_environments(folder, tmp_path, monkeypatch):
    """A process that exported a model has them on its path."""
    site = tmp_path / EXTRAS / "lib" / "python3.12" / "site-packages"
    (site / "onnx-1.22.0.dist-info").mkdir(parents=True)
    (site / "onnx-1.22.0.dist-info" / "METADATA").write_text("Name: onnx\nVersion: 1.22.0\n")
    monkeypatch.syspath_prepend(site)
    assert importlib.metadata.version("onnx") == "1.22.0"
    assert "onnx" not in installed_packages()
