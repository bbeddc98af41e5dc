"""conda-lock.yml belongs to environment.yml, requirements.txt to conda-lock.yml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.identity.environment import (
    CONDA_ONLY,
    PYTHON_NAMES,
    differences,
    installed_cuda,
    installed_packages,
    locked_cuda,
    python_pins,
    read_lock,
    read_requirements,
)

REPOSITORY = Path(__file__).parents[2]
# Each call of conda-lock takes some seconds: the tools' lock is checked in the slow suite.
LOCKS = {
    "conda-lock.yml": "environment.yml",
    "environment/tools/conda-lock.yml": "environment/tools/environment-tools.yml",
}


def conda_lock(*arguments, cwd):
    """conda-lock from .venv-tools, which `make test` sets up; /bin/true stands for conda.

    Nothing here may solve: where conda-lock wants to, it gets no answer and fails.
    """
    program = REPOSITORY / ".venv-tools/bin/conda-lock"
    assert program.exists(), "`make env-tools` sets up the tools that this test runs"
    return subprocess.run(
        [program, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
    )


def check_input_hash(folder, source, lock):
    return conda_lock(
        *("lock", "--check-input-hash", "--conda", "/bin/true", "--platform", "linux-64"),
        *("--file", source, "--lockfile", lock),
        *("--virtual-package-spec", "environment/virtual-packages.yml"),
        cwd=folder,
    )


EACH_LOCK = pytest.mark.parametrize(
    "lock",
    ["conda-lock.yml", pytest.param("environment/tools/conda-lock.yml", marks=pytest.mark.slow)],
)


@pytest.fixture
def copy(tmp_path):
    for name in (*LOCKS, *LOCKS.values(), "environment/virtual-packages.yml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


@EACH_LOCK
def test_conda_lock_calls_the_lock_up_to_date(copy, lock):
    before = (copy / lock).read_bytes()
    done = check_input_hash(copy, LOCKS[lock], lock)
    assert done.returncode == 0, done.stderr
    assert "Spec hash already locked for ['linux-64']" in done.stderr
    assert (copy / lock).read_bytes() == before


@pytest.mark.slow
def test_conda_lock_notices_a_changed_environment(copy):
    text = (copy / "environment.yml").read_text()
    (copy / "environment.yml").write_text(text.replace("- rich\n", "- rich>=15\n"))
    done = check_input_hash(copy, "environment.yml", "conda-lock.yml")
    assert done.returncode != 0
    assert "already locked" not in done.stderr


@EACH_LOCK
def test_conda_lock_renders_it_offline(copy, lock):
    done = conda_lock("render", "--kind", "explicit", "--platform", "linux-64", lock, cwd=copy)
    assert done.returncode == 0, done.stderr
    lines = (copy / "conda-linux-64.lock").read_text().splitlines()
    urls = [line for line in lines if not line.startswith(("#", "@"))]
    assert len(urls) == len(read_lock(copy / lock))
    assert all(re.search(r"\.(conda|tar\.bz2)#[0-9a-f]{32}$", url) for url in urls)


def test_every_python_package_has_the_locks_version_in_requirements():
    pins = python_pins(read_lock(REPOSITORY / "conda-lock.yml"))
    assert len(pins) > 200
    assert differences(pins, read_requirements(REPOSITORY / "requirements.txt")) == []


def test_what_requirements_hold_beyond_the_lock_are_parts_of_the_torch_wheel():
    """conda has CUDA as packages of its own; the wheels bring it as these."""
    pins = python_pins(read_lock(REPOSITORY / "conda-lock.yml"))
    beyond = set(read_requirements(REPOSITORY / "requirements.txt")) - set(pins)
    assert all(re.match(r"(nvidia|cuda)-|triton$", name) for name in beyond), beyond


def test_the_tables_of_names_hold_nothing_that_the_lock_lacks():
    names = {package.name for package in read_lock(REPOSITORY / "conda-lock.yml")}
    assert set(PYTHON_NAMES) | CONDA_ONLY <= names | {"cpython"}


def test_the_pins_are_derived_by_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "runkey.identity.environment"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    pins = python_pins(read_lock(REPOSITORY / "conda-lock.yml"))
    assert done.stdout == "".join(f"{name}=={version}\n" for name, version in pins.items())


@pytest.mark.parametrize(
    "name",
    [
        "requirements.txt",
        *(f"environment/{one}/requirements.txt" for one in ("tools", "convert", "test-servers")),
    ],
)
def test_every_requirement_has_a_hash_and_no_line_names_a_host(name):
    text = (REPOSITORY / name).read_text()
    pins = re.findall(r"^[^\s#].*$", text, re.MULTILINE)
    assert all(re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?==\S+( ; .+)? \\", pin) for pin in pins)
    assert len(re.findall(r"\\\n    --hash=sha256:[0-9a-f]{64}", text)) >= len(pins)
    assert not re.search(r"https?:|index|find-links|/tmp", text.replace("httpx", ""))


def test_what_is_installed_is_what_is_locked():
    """Fails where someone installed into .venv by hand; `make env` does not notice that."""
    locked = read_requirements(REPOSITORY / "requirements.txt")
    if os.environ.get("CONDA_PREFIX") == sys.prefix:
        # The CUDA of conda's torch is no Python package, and neither is uv.
        torch_parts = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton$|uv$|mlflow-tracing$)")
        locked = {name: v for name, v in locked.items() if not torch_parts.match(name)}
    assert differences(locked, installed_packages()) == []


def test_the_cuda_of_both_builds_of_torch_is_what_is_said_and_what_is_installed():
    """One version of torch, two builds: conda's, and the wheel that requirements.txt installs."""
    packages = read_lock(REPOSITORY / "conda-lock.yml")
    conda = locked_cuda(packages)
    wheel = locked_cuda(read_requirements(REPOSITORY / "requirements.txt"))
    builds = {p.name: p.build for p in packages if "cuda" in p.build}
    assert set(builds) >= {"pytorch", "libtorch", "torchvision", "triton"}
    tag = f"cuda{conda.replace('.', '')}"
    assert all(build.startswith(tag) for name, build in builds.items() if name != "cuda-version")
    assert next(p.version for p in packages if p.name == "cuda-version") == conda
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    said = {page.name: set(re.findall(r"CUDA (\d+\.\d+)", page.read_text())) for page in pages}
    assert said["dependencies.md"] == {conda, wheel}
    assert set().union(*said.values()) == {conda, wheel}, said
    import torch

    is_conda = os.environ.get("CONDA_PREFIX") == sys.prefix
    assert installed_cuda() == torch.version.cuda == (conda if is_conda else wheel)
    assert is_conda or torch.__version__.endswith(f"+cu{wheel.replace('.', '')}")
