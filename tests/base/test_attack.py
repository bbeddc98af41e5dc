"""`python -m benchmarks.attack` in short: 0 tracebacks, hangs, files outside, code executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.attack import BAD, GROUPS, PLANTED, REPOSITORY, run
from tests.support.once import made_once

SHORT = "params+records+dvc+archives+weights+exports"
"""In one process; the other groups draw pictures or ask servers, which takes minutes."""
FAULTS = ["traceback", "outside", "executed", "no line", "crash"]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        from tests.support.attacked import make_checkout

        (folder / "template").mkdir()
        make_checkout(folder / "template")

    return made_once(tmp_path_factory, "attacked", make)


def test_attacks_of_a_fixed_seed(box: Path) -> None:
    found = run(box, 20, 1, [SHORT])[SHORT]
    assert [one for one in found if one["verdict"] in BAD] == []
    assert {one["verdict"] for one in found} == {"accepted", "refused"}


@pytest.mark.slow
def test_the_harness_sees_planted_faults(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLANTED, ",".join(FAULTS))
    found = run(box, len(FAULTS), 0, ["weights"])["weights"]
    assert [one["verdict"] for one in found] == FAULTS


def test_a_worker_that_cannot_start_is_no_finding(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.attack.sys.executable", "/bin/false")
    with pytest.raises(SystemExit, match="a worker cannot start"):
        run(box, 5, 0, ["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_more_attacks(box: Path, group: str) -> None:
    if group == "labels" and not (REPOSITORY / ".venv-convert").exists():
        pytest.skip("`make env-convert` installs globox")
    found = run(box, 60, 2, [group])[group]
    assert [one for one in found if one["verdict"] in BAD] == []
