"""The site of the documentation, made once by the command that `make docs` types."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Build = Callable[[Path, Path], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def build() -> Build:
    """Makes the site of a source folder in another folder, as `make docs` does."""
    typed = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in typed.stdout.splitlines() if "sphinx-build" in line]
    assert len(lines) == 1, typed
    program, *options = shlex.split(lines[0])
    assert options[-2:] == [".", ".site"], options
    assert (ROOT / program).exists(), "`make env-tools` sets up the tools that this test runs"

    def run(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / program), *options[:-1], str(site)]
        return subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def site(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder
