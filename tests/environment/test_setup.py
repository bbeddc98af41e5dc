"""environment/setup.sh: from nothing to .venv, and nothing when there is nothing to do.

Each test has a repository of its own whose requirements are empty: all but the download is real.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("sh", "sed", "awk", "cat", "cmp", "dirname", "uname", "grep", "mkdir", "rm", "chmod")


@pytest.fixture
def clone(tmp_path):
    """A repository, and a PATH with nothing but the commands that every machine has."""
    (tmp_path / "repository/environment").mkdir(parents=True)
    for name in ("setup.sh", "console.py"):
        shutil.copy(REPOSITORY / "environment" / name, tmp_path / "repository/environment")
    shutil.copy(REPOSITORY / "conda-lock.yml", tmp_path / "repository")
    (tmp_path / "repository/requirements.txt").write_text("# nothing\n")
    (tmp_path / "bin").mkdir()
    for command in COMMANDS:
        found = shutil.which(command)
        assert found
        (tmp_path / "bin" / command).symlink_to(found)
    return tmp_path / "repository"


@pytest.fixture
def clone_with_python(clone):
    add(clone, "python3.12", Path(sys.executable).resolve())
    add(clone, "uv", Path(sys.executable).with_name("uv"))
    return clone


def add(clone, name, target):
    """A command on the PATH; by a script, so that a link does not hide where Python lies."""
    path = clone.parent / "bin" / name
    path.write_text(f'#!/bin/sh\necho {name} >>"{clone.parent}/calls"\nexec "{target}" "$@"\n')
    path.chmod(0o755)


def set_up(clone, *arguments, **environment):
    return subprocess.run(
        ["sh", "environment/setup.sh", *(arguments or (".venv", "requirements.txt"))],
        cwd=clone,
        env={"PATH": str(clone.parent / "bin"), "HOME": str(clone.parent), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def works(clone):
    program = clone / ".venv/bin/python"
    done = subprocess.run(
        [program, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True
    )
    return done.stdout.strip() == str(clone / ".venv")


def test_no_python_312_is_one_line_that_says_how_to_get_it(clone):
    add(clone, "python3", shutil.which("false"))
    done = set_up(clone)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: Python 3.12 is not on PATH: install ")
    assert not (clone / ".venv").exists()


def test_from_nothing_and_then_nothing_to_do(clone_with_python):
    first = set_up(clone_with_python)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("environment: ")
    assert works(clone_with_python)
    (clone_with_python.parent / "calls").unlink()
    second = set_up(clone_with_python)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert not (clone_with_python.parent / "calls").exists()


COMMAND_LINE = """\
import os, sys
def main():
    print(sys.prefix, os.path.dirname(os.path.dirname(__file__)), *sys.argv[1:])
"""


def add_runkey(repository):
    (repository / "runkey").mkdir(parents=True)
    (repository / "runkey/__init__.py").touch()
    (repository / "runkey/__main__.py").touch()
    (repository / "runkey/cli.py").write_text(COMMAND_LINE)


def runkey(clone, folder, *arguments):
    program = clone / ".venv/bin/runkey"
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True)


def test_the_command_runs_the_repository_that_one_stands_in(clone_with_python, tmp_path):
    set_up(clone_with_python)
    add_runkey(clone_with_python)
    add_runkey(tmp_path / "other clone")
    (tmp_path / "other clone/a/b").mkdir(parents=True)
    prefix = clone_with_python / ".venv"
    for folder, repository in [
        (clone_with_python, clone_with_python),
        (clone_with_python / "environment", clone_with_python),
        (clone_with_python / "runkey", clone_with_python),
        (tmp_path / "other clone/a/b", tmp_path / "other clone"),
        (tmp_path, clone_with_python),
    ]:
        done = runkey(clone_with_python, folder, "a b", "$0")
        assert (done.stdout, done.stderr) == (f"{prefix} {repository} a b $0\n", "")
    link = tmp_path / "linked"
    link.symlink_to(clone_with_python / ".venv/bin/runkey")
    done = subprocess.run([link], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{prefix} {clone_with_python}\n"


def test_the_command_is_made_where_a_folder_has_a_blank(clone_with_python, tmp_path):
    blank = tmp_path / "my clone"
    shutil.copytree(clone_with_python, blank, symlinks=True)
    set_up(blank, PATH=str(clone_with_python.parent / "bin"))
    add_runkey(blank)
    assert runkey(blank, blank).stdout == f"{blank}/.venv {blank}\n"


def test_a_lost_or_an_old_command_is_written_anew(clone_with_python):
    set_up(clone_with_python)
    program = clone_with_python / ".venv/bin/runkey"
    before = program.read_bytes()
    program.write_bytes(b"#!/bin/sh\n")
    assert set_up(clone_with_python).stdout == ""
    assert program.read_bytes() == before
    program.unlink()
    set_up(clone_with_python)
    assert program.read_bytes() == before
    assert os.access(program, os.X_OK)


def test_only_the_main_environment_has_the_command(clone_with_python):
    assert set_up(clone_with_python, ".venv-tools", "requirements.txt").returncode == 0
    assert not (clone_with_python / ".venv-tools/bin/runkey").exists()


def test_python3_will_do_if_it_is_312(clone_with_python):
    (clone_with_python.parent / "bin/python3.12").rename(clone_with_python.parent / "bin/python3")
    assert set_up(clone_with_python).returncode == 0
    assert works(clone_with_python)


def test_changed_requirements_are_installed(clone_with_python):
    set_up(clone_with_python)
    (clone_with_python / "requirements.txt").write_text("# still nothing\n")
    done = set_up(clone_with_python)
    assert done.stdout.startswith("environment: ")
    assert set_up(clone_with_python).stdout == ""


def test_an_interrupted_set_up_is_begun_anew(clone_with_python):
    set_up(clone_with_python)
    (clone_with_python / ".venv/unfinished").touch()
    (clone_with_python / ".venv/requirements.installed").unlink()
    (clone_with_python / ".venv/half").touch()
    assert set_up(clone_with_python).returncode == 0
    assert works(clone_with_python)
    assert not (clone_with_python / ".venv/half").exists()
    assert not (clone_with_python / ".venv/unfinished").exists()


def test_a_failed_installation_is_no_environment(clone_with_python):
    (clone_with_python / "requirements.txt").write_text("no-hash==1.0\n")
    for _ in range(2):
        done = set_up(clone_with_python, UV_OFFLINE="1")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(
            "error: requirements.txt could not be installed into .venv; see the lines above"
        )


def test_an_environment_whose_python_is_gone_is_made_anew(clone_with_python):
    set_up(clone_with_python)
    for name in ("python", "python3", "python3.12"):
        (clone_with_python / ".venv/bin" / name).unlink(missing_ok=True)
    assert set_up(clone_with_python).returncode == 0
    assert works(clone_with_python)


def test_a_copied_environment_is_made_anew(clone_with_python, tmp_path):
    """Its scripts name the folder that they were installed into."""
    set_up(clone_with_python)
    copy = tmp_path / "copy"
    shutil.copytree(clone_with_python, copy, symlinks=True)
    done = set_up(copy, PATH=str(clone_with_python.parent / "bin"))
    assert done.stdout.startswith("environment: ")


@pytest.fixture
def conda(clone_with_python):
    """A folder as conda makes it, with the record of every locked build."""
    prefix = clone_with_python.parent / "conda"
    (prefix / "conda-meta").mkdir(parents=True)
    (prefix / "bin").mkdir()
    (prefix / "bin/python").symlink_to(Path(sys.executable).resolve())
    for line in (clone_with_python / "conda-lock.yml").read_text().splitlines():
        if line.startswith("  url: "):
            file = line.rsplit("/", 1)[-1].removesuffix(".conda").removesuffix(".tar.bz2")
            (prefix / "conda-meta" / f"{file}.json").touch()
    return prefix


def test_an_active_conda_environment_with_the_locked_packages_is_used(clone_with_python, conda):
    active = {"CONDA_PREFIX": str(conda)}
    assert set_up(clone_with_python, "--bin", **active).stdout == f"{conda}/bin\n"
    done = set_up(clone_with_python, **active)
    assert (done.returncode, done.stdout) == (0, "")
    assert not (clone_with_python / ".venv").exists()


def test_another_conda_environment_is_not(clone_with_python, conda):
    next((conda / "conda-meta").glob("numpy-*.json")).unlink()
    active = {"CONDA_PREFIX": str(conda)}
    expected = f"{clone_with_python}/.venv/bin\n"
    assert set_up(clone_with_python, "--bin", **active).stdout == expected
    assert set_up(clone_with_python, **active).returncode == 0
    assert works(clone_with_python)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_uv_the_pinned_one_is_installed_inside(clone_with_python):
    """Asks the package index (or a cache of it) for uv."""
    (clone_with_python.parent / "bin/uv").unlink()
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("uv=="))
    end = next(i for i in range(start, len(lines)) if not lines[i].endswith("\\"))
    (clone_with_python / "requirements.txt").write_text("\n".join(lines[start : end + 1]) + "\n")
    passed_on = {k: v for k, v in os.environ.items() if "PIP" in k or "UV" in k or "CERT" in k}
    done = set_up(clone_with_python, **passed_on)
    assert done.returncode == 0, done.stderr
    assert (clone_with_python / ".venv/bootstrap/bin/uv").exists()
    assert (clone_with_python / ".venv/bin/uv").exists()
    assert set_up(clone_with_python).stdout == ""
