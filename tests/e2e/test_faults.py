"""Ranks on two machines that lose each other: named, ended, started again with the same bits."""

from __future__ import annotations

import pytest

from benchmarks.faults import Bench
from tests.support.nodes import why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# 20 s of silence and a beat, as docs/distributed.md says; the rest is for a busy machine.
LONGEST = 60.0


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if reason := why_not():
        pytest.skip(reason)
    return Bench(tmp_path_factory.mktemp("faults"), stage=False)


@pytest.mark.parametrize("name", ["cut", "drop", "cut-kill", "cut-kill-0", "pause", "pause-0"])
def test_a_rank_that_goes_silent_is_named(bench: Bench, name: str) -> None:
    row = bench.try_fault(name)
    assert max(row.named.values()) < LONGEST, row
    assert " gave no sign of life for " in row.line
    assert "; training ends on all ranks; stopped after step " in row.line
    assert row.claim.endswith("no beat"), row
    assert (row.lost, row.bits) == ("0 steps", "same"), row


@pytest.mark.parametrize("name", ["blink", "nap", "slow"])
def test_what_is_over_soon_changes_nothing(bench: Bench, name: str) -> None:
    row = bench.try_fault(name)
    assert (row.code, row.bits) == ("0/0", "same"), row


@pytest.mark.parametrize("name", ["absent", "unresolved"])
def test_a_start_that_hangs_says_so_and_can_be_ended(bench: Bench, name: str) -> None:
    row = bench.try_start(name)
    assert " s after SIGTERM: " in row.line, row
    assert row.bits == "same", row
