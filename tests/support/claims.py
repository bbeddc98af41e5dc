from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runkey.registry.claims import Claim, FileClaims, Owner, this_owner
from runkey.registry.once import Rhythm
from tests.support.records import key_of

KEY = key_of("this one")
FAST = Rhythm(beat_seconds=0.05, dead_after=0.6, poll_seconds=0.02)


def a_claim(generation: int = 1, key: str = KEY, **changes: Any) -> Claim:
    """A claim of this process."""
    claim = Claim(
        key=key,
        generation=generation,
        owner=this_owner(),
        state="running",
        run_id=None,
        beat=0,
        since_ms=1_700_000_000_000,
    )
    return replace(claim, **changes)


@pytest.fixture
def claims(tmp_path: Path) -> FileClaims:
    return FileClaims(tmp_path / ".runkey" / "claims")


class Lines(logging.Handler):
    """Collects log messages."""

    def __init__(self, add: Callable[[str], object]) -> None:
        super().__init__()
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add(record.getMessage())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The messages that the registry logs, also from threads."""
    lines: list[str] = []
    handler, logger = Lines(lines.append), logging.getLogger("runkey.registry")
    logger.addHandler(handler)
    with caplog.at_level(logging.INFO, logger="runkey.registry"):
        yield lines
    logger.removeHandler(handler)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process, which lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def owner_of(process: subprocess.Popen[str]) -> Owner:
    """The owner that another process of this machine is."""
    stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    started = int(stat.rpartition(")")[2].split()[19])
    return replace(this_owner(), pid=process.pid, started=started)
