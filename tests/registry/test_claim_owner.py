"""Who trains, and whether that process is still there: real processes, real namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from runkey.processes import is_running
from runkey.registry.claims import Owner, this_owner
from tests.support.claim_rounds import CONTAINER, REPOSITORY
from tests.support.claims import owner_of


def test_a_process_is_known_by_itself_and_by_others(other: subprocess.Popen[str]) -> None:
    assert is_running(this_owner()) is True
    assert is_running(owner_of(other)) is True


def test_a_killed_process_is_gone_even_before_its_parent_noticed(
    other: subprocess.Popen[str],
) -> None:
    owner = owner_of(other)
    other.kill()
    with open(f"/proc/{other.pid}/stat", encoding="utf-8") as stat:  # noqa: PTH123
        while ") Z " not in stat.read():
            stat.seek(0)
    assert is_running(owner) is False
    other.wait()
    assert is_running(owner) is False


def test_another_process_with_the_same_number_is_not_the_owner() -> None:
    here = this_owner()
    assert is_running(replace(here, started=here.started - 1)) is False


@pytest.mark.parametrize(
    "elsewhere", [{"boot": "another"}, {"namespace": "pid:[1]"}, {"boot": "", "namespace": ""}]
)
def test_of_a_process_elsewhere_nothing_is_known(elsewhere: dict[str, str]) -> None:
    assert is_running(replace(this_owner(), **elsewhere)) is None


@pytest.mark.parametrize("own_proc", [True, False], ids=["own /proc", "the outer /proc"])
def test_a_container_is_elsewhere_although_its_numbers_look_the_same(own_proc: bool) -> None:
    """Its pid 1 is not ours, and with the outer /proc mounted it must not trust that either."""
    program = "import json; from runkey.registry.claims import *;"
    program += "print(json.dumps([vars(this_owner()), is_running(this_owner())]))"
    prefix = CONTAINER if own_proc else CONTAINER[:-1]
    command = [*prefix, sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {program}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("pid namespaces are not permitted here")
    assert done.returncode == 0, done.stderr
    stored, inside = json.loads(done.stdout)
    owner = Owner.from_dict(stored)
    assert owner.pid < 10  # the container's count
    assert inside is (True if own_proc else None)
    assert is_running(owner) is None


def test_owners_are_told_apart_and_written_down_whole() -> None:
    first, second = this_owner(), this_owner()
    assert first.nonce != second.nonce
    assert Owner.from_dict(vars(first)) == first
    with pytest.raises(ValueError, match="other fields"):
        Owner.from_dict(vars(first) | {"pid": "7"})
    with pytest.raises(ValueError, match="Field required"):
        Owner.from_dict({"host": "a"})
