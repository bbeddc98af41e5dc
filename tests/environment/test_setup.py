"""environment/setup.sh: from nothing to .venv, and nothing when there is nothing to do.

Each test has a repository of its own with our pyproject.toml, a small runkey/ and empty
requirements: all but the download is real.  setuptools, which is locked and builds the project,
comes from the environment that runs the tests.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("sh", "sed", "awk", "cat", "cmp", "dirname", "uname", "grep", "mkdir", "rm", "chmod")


COMMAND_LINE = """\
import sys
from pathlib import Path
def main():
    print(sys.prefix, Path(__file__).parents[1], *sys.argv[1:])
"""


@pytest.fixture
def clone(tmp_path):
    """A repository, and a PATH with nothing but the commands that every machine has."""
    repository = tmp_path / "repository"
    (repository / "environment").mkdir(parents=True)
    shutil.copy(REPOSITORY / "environment/setup.sh", repository / "environment")
    for name in ("conda-lock.yml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, repository)
    (repository / "requirements.txt").write_text("# nothing\n")
    (repository / "runkey").mkdir()
    (repository / "runkey/__init__.py").touch()
    (repository / "runkey/version.py").write_text('__version__ = "7.8"\n')
    (repository / "runkey/cli.py").write_text(COMMAND_LINE)
    (tmp_path / "backend").mkdir()
    packages = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for path in (packages / "_distutils_hack", *packages.glob("setuptools*")):
        (tmp_path / "backend" / path.name).symlink_to(path)
    (tmp_path / "bin").mkdir()
    for command in COMMANDS:
        found = shutil.which(command)
        assert found
        (tmp_path / "bin" / command).symlink_to(found)
    return repository


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
    home = clone.parent
    base = {"PATH": str(home / "bin"), "HOME": str(home), "PYTHONPATH": str(home / "backend")}
    return subprocess.run(
        ["sh", "environment/setup.sh", *(arguments or (".venv", "requirements.txt"))],
        cwd=clone,
        env=base | environment,
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


def runkey(clone, folder, *arguments):
    program = clone / ".venv/bin/runkey"
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True)


def test_the_project_is_installed_in_editable_form(clone_with_python, tmp_path):
    set_up(clone_with_python)
    expected = f"{clone_with_python}/.venv {clone_with_python} a b $0\n"
    for folder in (clone_with_python, clone_with_python / "environment", tmp_path):
        done = runkey(clone_with_python, folder, "a b", "$0")
        assert (done.stdout, done.stderr) == (expected, "")
    (clone_with_python / "runkey/cli.py").write_text("def main():\n    print('edited')\n")
    assert runkey(clone_with_python, tmp_path).stdout == "edited\n"


def test_python_m_runs_the_code_of_the_folder_and_not_the_installed_one(clone_with_python):
    """As the stages do in worktrees of `runkey reproduce` and in DVC's temporary folders."""
    set_up(clone_with_python)
    other = clone_with_python.parent / "other"
    shutil.copytree(clone_with_python / "runkey", other / "runkey")
    (other / "stages").mkdir()
    (other / "stages/train.py").write_text("import runkey.cli\nrunkey.cli.main()\n")
    done = subprocess.run(
        [clone_with_python / ".venv/bin/python", "-m", "stages.train"],
        cwd=other, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"{clone_with_python}/.venv {other}\n", done.stderr


def test_the_command_works_where_a_folder_has_a_blank(clone_with_python, tmp_path):
    blank = tmp_path / "my clone"
    shutil.copytree(clone_with_python, blank, symlinks=True)
    assert set_up(blank).returncode == 0
    assert runkey(blank, blank).stdout == f"{blank}/.venv {blank}\n"


def test_a_lost_command_is_installed_anew(clone_with_python):
    set_up(clone_with_python)
    (clone_with_python / ".venv/bin/runkey").unlink()
    assert set_up(clone_with_python).stdout == ""
    assert runkey(clone_with_python, "/").returncode == 0


def installed_version(clone):
    code = "import importlib.metadata as m; print(m.version('runkey'))"
    return subprocess.run(
        [clone / ".venv/bin/python", "-c", code], cwd="/", capture_output=True, text=True
    ).stdout.strip()


def test_a_new_version_or_other_settings_install_the_project_anew_and_nothing_else(
    clone_with_python,
):
    set_up(clone_with_python)
    assert installed_version(clone_with_python) == "7.8"
    (clone_with_python / "runkey/version.py").write_text('__version__ = "7.9"\n')
    done = set_up(clone_with_python)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert installed_version(clone_with_python) == "7.9"


def test_a_project_that_cannot_be_built_is_an_error_with_its_reason(clone_with_python):
    with (clone_with_python / "pyproject.toml").open("a") as file:
        file.write("[[[\n")
    for _ in range(2):
        done = set_up(clone_with_python)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(
            "error: runkey could not be installed into .venv; see the lines above"
        )


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


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_copied_or_moved_environment_is_set_up_again(clone_with_python, tmp_path, how):
    """Its scripts and the project's install name the folder that they were installed into."""
    set_up(clone_with_python)
    there = tmp_path / "there"
    if how == "copied":
        shutil.copytree(clone_with_python, there, symlinks=True)
    else:
        clone_with_python.rename(there)
    assert set_up(there).stdout.startswith("environment: ")
    assert runkey(there, tmp_path).stdout == f"{there}/.venv {there}\n"
    assert set_up(there).stdout == ""


def require_dvc(clone):
    """Pin a package `dvc` that is a command and nothing else, in a folder of wheels."""
    wheel = clone.parent / "wheels/dvc-3.0-py3-none-any.whl"
    wheel.parent.mkdir()
    about = "dvc-3.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("dvc.py", "import sys\ndef main():\n    print(sys.prefix)\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: dvc\nVersion: 3.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", "[console_scripts]\ndvc = dvc:main\n")
        archive.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (clone / "requirements.txt").write_text(f"dvc==3.0 --hash=sha256:{digest}\n")
    return {"UV_FIND_LINKS": str(wheel.parent), "UV_OFFLINE": "1", "UV_NO_CACHE": "1"}


def says_dvc(clone):
    done = subprocess.run([clone / ".venv/bin/dvc"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def move(clone):
    target = clone.parent / "moved"
    clone.rename(target)
    return target


def copy_beside(clone):
    target = clone.parent / "copied"
    shutil.copytree(clone, target, symlinks=True)
    return target


def break_command(clone):
    (clone / ".venv/bin/dvc").write_text("#!/nowhere/python\n")
    return clone


def lose_module(clone):
    """As `pip uninstall` does that is killed half-way."""
    next((clone / ".venv/lib").glob("python3*/site-packages/dvc.py")).unlink()
    return clone


@pytest.mark.parametrize(
    "how",
    [
        break_command,
        lose_module,
        pytest.param(move, marks=pytest.mark.slow),
        pytest.param(copy_beside, marks=pytest.mark.slow),
    ],
)
def test_a_dvc_that_does_not_start_is_installed_anew(clone_with_python, how):
    links = require_dvc(clone_with_python)
    assert set_up(clone_with_python, **links).returncode == 0
    assert says_dvc(clone_with_python) == f"{clone_with_python}/.venv"
    clone = how(clone_with_python)
    done = set_up(clone, **links)
    assert (done.returncode, done.stdout.startswith("environment: ")) == (0, True), done.stderr
    assert says_dvc(clone) == f"{clone}/.venv"
    assert set_up(clone, **links).stdout == ""


ODD = {
    "CDPATH": "/:/tmp",
    "PYTHONHOME": "/nowhere",
    "PYTHONSAFEPATH": "1",
    "PYTHONSTARTUP": "/nowhere/startup.py",
    "PYTHONWARNINGS": "error",
    "PYTHONINSPECT": "1",
    "PIP_USER": "1",
    "PIP_TARGET": "/nowhere/target",
    "PIP_REQUIRE_VIRTUALENV": "1",
    "UV_SYSTEM_PYTHON": "1",
    "UV_EXCLUDE_NEWER": "2001-01-01",
    "UV_CONSTRAINT": "/nowhere/constraints",
    "UV_WORKING_DIR": "/tmp",
    "LC_ALL": "C",
    "TMPDIR": "/nowhere/tmp",
    "HOME": "/nowhere",
    "RANK": "",
    "GIT_DIR": "/nowhere/.git",
}


@pytest.mark.parametrize(
    "name",
    [
        "a?b#c%20d \u202fü",
        'it\'s "$HOME" `id` &;(',
        # Python drops these from the end of a line of a .pth file.
        *(f"end{blank}" for blank in "\u202f\u00a0\u3000\u2028\u0085 "),
    ],
)
def test_odd_variables_folders_and_a_uv_toml_above(clone_with_python, name):
    links = require_dvc(clone_with_python)
    clone = clone_with_python.parent / name
    clone_with_python.rename(clone)
    (clone.parent / "uv.toml").write_text("no-such = 1\n[pip]\ntarget = '/nowhere/uv'\n")
    assert set_up(clone, "--bin", **ODD).stdout == ".venv/bin\n"
    del links["UV_NO_CACHE"]  # without a home its cache has no place
    done = set_up(clone, **ODD, **links)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert says_dvc(clone) == f"{clone}/.venv"
    assert set_up(clone, **ODD, **links).stdout == ""
    assert not (clone / ".venv/cache").exists()
    assert runkey(clone, clone).stdout == f"{clone}/.venv {clone}\n"
    # `make`, and what it starts by the PATH
    path = {"PATH": f"{clone.parent / 'bin'}:/bin:/usr/bin"}
    make = ["make", "-f", REPOSITORY / "Makefile", "--eval", "try: ; @$(BIN)/dvc && dvc", "try"]
    made = subprocess.run(make, cwd=clone, env=ODD | path, capture_output=True, text=True)
    assert (made.stdout, made.stderr) == (2 * f"{clone}/.venv\n", "")


@pytest.mark.parametrize("name", ["co:lon", "line\nbreak", "line\rbreak", "end\r", "a\ttab"])
def test_a_folder_that_path_cannot_hold_is_one_line(clone_with_python, name):
    clone = clone_with_python.parent / name
    clone_with_python.rename(clone)
    done = set_up(clone)
    assert (done.returncode, done.stdout) == (1, "")
    shown = str(clone).replace("\r", "\n")  # as Python reads text
    what = "PATH and scripts cannot hold a folder with a colon, tab or line break in its name"
    assert done.stderr == f"error: {shown}: {what}; rename it\n"
    assert not (clone / ".venv").exists()


@pytest.mark.slow
def test_pip_brings_uv_whatever_its_configuration_says(clone_with_python, tmp_path):
    """Where there is no uv, a venv of its own installs the pinned one."""
    (clone_with_python.parent / "bin/uv").unlink()
    wheel = next(iter(require_dvc(clone_with_python).values()))
    config = tmp_path / "pip.conf"
    config.write_text("[install]\nuser = true\ntarget = /nowhere/target\n")
    with (clone_with_python / "requirements.txt").open("a") as file:
        file.write("uv==0.0.1 --hash=sha256:" + "0" * 64 + "\n")
    more = {"PIP_CONFIG_FILE": str(config), "PIP_USER": "1", "PIP_NO_INDEX": "1"}
    done = set_up(clone_with_python, **more, PIP_FIND_LINKS=wheel)
    assert done.returncode == 1
    assert "No matching distribution found for uv==0.0.1" in done.stderr
    assert done.stderr.endswith("uv could not be installed; see the lines above, then try again\n")


@pytest.fixture
def conda(clone_with_python):
    """A folder as conda makes it, with the record of every locked build."""
    prefix = clone_with_python.parent / "conda"
    python = Path(sys.executable).resolve()
    subprocess.run([python, "-m", "venv", "--without-pip", prefix], check=True)
    (clone_with_python.parent / "bin/uv").rename(prefix / "bin/uv")
    (prefix / "conda-meta").mkdir()
    for line in (clone_with_python / "conda-lock.yml").read_text().splitlines():
        if line.startswith("  url: "):
            file = line.rsplit("/", 1)[-1].removesuffix(".conda").removesuffix(".tar.bz2")
            (prefix / "conda-meta" / f"{file}.json").touch()
    return prefix


def test_an_active_conda_environment_with_the_locked_packages_is_used(clone_with_python, conda):
    active = {"CONDA_PREFIX": str(conda)}
    assert set_up(clone_with_python, "--bin", **active).stdout == f"{conda}/bin\n"
    for _ in range(2):
        done = set_up(clone_with_python, **active)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # The project is installed into it, once.
    assert (clone_with_python.parent / "calls").read_text().split() == ["uv"]
    done = subprocess.run([conda / "bin/runkey"], cwd=conda, capture_output=True, text=True)
    assert done.stdout == f"{conda} {clone_with_python}\n"
    assert not (clone_with_python / ".venv").exists()


def test_another_conda_environment_is_not(clone_with_python, conda):
    next((conda / "conda-meta").glob("numpy-*.json")).unlink()
    (conda / "bin/uv").rename(clone_with_python.parent / "bin/uv")
    active = {"CONDA_PREFIX": str(conda)}
    assert set_up(clone_with_python, "--bin", **active).stdout == ".venv/bin\n"
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
    assert (clone_with_python / ".venv/bootstrap/uv/bin/uv").exists()
    assert (clone_with_python / ".venv/bin/uv").exists()
    assert set_up(clone_with_python).stdout == ""
