"""The repository as a whole: what is typed, what is imported, what is tracked."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_make_help_lists_every_target():
    text = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE))
    assert {"repro", "test", "test-all", "lint", "fix", "ui", "lock", "preset", "clean"} <= targets
    done = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^  (\S+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert set(listed) == targets
    assert max(map(len, done.stdout.splitlines())) <= 100


# The names are split so that this file is not among those found.
HOSTS = r"py[p]i\.org|pyth[o]nhosted|deb[i]an\.org|npm[j]s\.(org|com)"
PATHS = r"/(w[o]rk|f[a]rm|r[o]ot)/[A-Za-z.]"


def test_no_tracked_file_names_a_package_registry_or_a_path_of_one_machine():
    done = subprocess.run(
        ["git", "grep", "-nIE", f"{HOSTS}|{PATHS}", "--", ".", ":!conda-lock.yml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout


def test_the_tools_of_the_hooks_are_those_of_make_lint():
    """One set of versions: hooks run from .venv-tools, and nothing is fetched for them."""
    text = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^  - repo: (.*)$", text, re.MULTILINE) == ["local"]
    assert set(re.findall(r"language: (\w+)", text)) == {"system", "pygrep"}
    pins = (REPOSITORY / "environment/tools/requirements.txt").read_text()
    for tool in ("ruff", "mypy", "import-linter", "pre-commit", "conda-lock"):
        assert re.search(rf"^{tool}==", pins, re.MULTILINE)
    programs = set(re.findall(r"\.venv-tools/bin/(\S+)", text))
    assert {"ruff", "mypy", "lint-imports"} <= programs
    assert all((REPOSITORY / ".venv-tools/bin" / program).exists() for program in programs)


@pytest.mark.parametrize(
    "variable", ["DVC_NO_ANALYTICS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"]
)
def test_make_turns_reporting_home_off(variable):
    text = (REPOSITORY / "Makefile").read_text()
    assert re.search(rf"^export {variable} := (1|true)$", text, re.MULTILINE)


def test_continuous_integration_runs_what_people_run():
    text = (REPOSITORY / ".ci/run").read_text()
    assert re.search(r"^make lint test$", text, re.MULTILINE)
    mode = subprocess.run(
        ["git", "ls-files", "--stage", ".ci/run"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert mode.startswith("100755")
    workflow = (REPOSITORY / ".github/workflows/ci.yml").read_text()
    assert re.search(r"run: \.ci/run$", workflow, re.MULTILINE)
    version = (REPOSITORY / ".python-version").read_text().strip()
    assert f'python-version: "{version}"' in workflow
