"""Real processes that ask for one key at the same time; owners are killed and stopped."""

from __future__ import annotations

import queue
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.claims import problem, rounds, server
from runkey.registry.claims import open_claims
from runkey.registry.once import Rhythm
from tests.support.claim_rounds import CONTAINER, QUICK, Askers, Event
from tests.support.records import key_of

KEY = key_of("asked by all")
UNSEEN = Rhythm(beat_seconds=0.25, dead_after=2.0, poll_seconds=0.1)


def promised(number: int, result: dict[str, object]) -> bool:
    """Exactly one trains, all others get its files; a killed owner is followed exactly once."""
    wanted = {
        "trained": 2 * number,
        "reused": 13 * number,
        "killed": number,
        "takeovers": number,
        "lost": 0,
        "alone": 0,
        "exceptions": 0,
        "rounds that went wrong": [],
    }
    return {name: result[name] for name in wanted} == wanted


def local(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def test_eight_ask_one_trains_one_takes_over(tmp_path: Path) -> None:
    with Askers(local(tmp_path), tmp_path) as askers:
        result = rounds(askers, 2)
    assert promised(2, result), result


@pytest.mark.slow
def test_twenty_rounds_beside_a_local_store(tmp_path: Path) -> None:
    with Askers(local(tmp_path), tmp_path) as askers:
        result = rounds(askers, 20)
    assert promised(20, result), result


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_rounds_on_a_server(tmp_path: Path) -> None:
    with server(tmp_path) as address, Askers(address, tmp_path) as askers:
        result = rounds(askers, 20)
    assert promised(20, result), result


def test_an_owner_that_was_stopped_too_long_notices_that_it_lost(tmp_path: Path) -> None:
    with Askers(local(tmp_path), tmp_path, 2, replace(UNSEEN, dead_after=1.5)) as askers:
        first, second = askers.askers
        first.ask(KEY, time.monotonic(), seconds=30)
        trains = _next(askers.events, "trains")
        first.send(signal.SIGSTOP)
        second.ask(KEY, time.monotonic(), seconds=0.1)
        takes_over = _next(askers.events, "trains")
        trained = _next(askers.events, "trained")
        first.send(signal.SIGCONT)
        lost = _next(askers.events, "lost")
    assert (trains["asker"], takes_over["asker"], trained["asker"]) == (0, 1, 1)
    assert "no sign of life for" in takes_over["line"]
    assert f":{second.process.pid} took over as generation 2" in lost["text"]
    claims = open_claims(local(tmp_path), tmp_path / ".runkey").of(KEY)
    assert [(c.state, c.run_id) for c in claims] == [
        ("running", trains["claim"]["run_id"]),  # the lost owner wrote nothing more
        ("finished", trained["run_id"]),
    ]


def test_in_containers_only_the_beat_tells_who_lives(tmp_path: Path) -> None:
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("pid namespaces are not permitted here")
    with Askers(local(tmp_path), tmp_path, 3, UNSEEN, CONTAINER) as askers:
        # Longer than the time after which a claim that does not beat is dead.
        lived = askers.ask(key_of("long"), seconds=1.4 * UNSEEN.dead_after)
        died = askers.ask(key_of("killed"), kill=True)
    assert not problem(lived, 3, kill=False)
    assert not problem(died, 3, kill=True)
    assert "(no sign of life for" in died.of("trains")[1]["line"]
    assert died.takeover_seconds > UNSEEN.dead_after - UNSEEN.beat_seconds - QUICK.poll_seconds


def _next(events: queue.Queue[Event], kind: str) -> Event:
    """The next event of a kind; any other end of a question is an error."""
    while (event := events.get(timeout=60))["event"] != kind:
        assert event["event"] == "said", event
    return event
