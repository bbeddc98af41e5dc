from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runkey.registry.claims.claim_files import FileClaims
from runkey.registry.claims.claims import Claim
from runkey.registry.claims.keeper import Rhythm
from runkey.registry.claims.owner import Owner, this_process
from tests.support.records import key_of

KEY = key_of("this one")
FAST = Rhythm(beat_seconds=0.05, dead_after=0.6, poll_seconds=0.02)


def a_claim(generation: int = 1, key: str = KEY, **changes: Any) -> Claim:
    """A claim of this process."""
    claim = Claim(
        key=key,
        generation=generation,
        owner=this_process(),
        state="running",
        run_id=None,
        beat=0,
        since_ms=1_700_000_000_000,
    )
    return replace(claim, **changes)


@pytest.fixture
def claims(tmp_path: Path) -> FileClaims:
    return FileClaims(tmp_path / ".runkey" / "claims")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process, which lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def owner_of(process: subprocess.Popen[str]) -> Owner:
    """What `this_process` says in another process on this machine."""
    stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    started = int(stat.rpartition(")")[2].split()[19])
    return replace(this_process(), pid=process.pid, started=started)
