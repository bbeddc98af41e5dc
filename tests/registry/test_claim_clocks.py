"""Owner and waiter of a claim whose clocks differ by two days."""

from __future__ import annotations

import queue
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.claims import server
from tests.support.claim_rounds import CONTAINER, QUICK, Asker, Event
from tests.support.records import key_of

COMPILER = shutil.which("cc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not COMPILER, reason="on Debian: apt-get install gcc libc6-dev"),
]
KEY = key_of("at another time")
SHIFT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, now);
  const char *seconds = getenv("SHIFT_SECONDS");
  if (id == CLOCK_REALTIME && seconds) now->tv_sec += atol(seconds);
  return code;
}
"""
"""Sets the clock on the wall alone: libfaketime 0.9.10 makes days of the pauses of Python 3.12."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clock")
    (folder / "shift.c").write_text(SHIFT)
    assert COMPILER
    command = [COMPILER, "-shared", "-fPIC", "-o", "shift.so", "shift.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "shift.so"


@contextmanager
def place(name: str, folder: Path) -> Iterator[str]:
    if name == "server":
        with server(folder) as address:
            yield address
    else:
        yield f"sqlite:///{folder / 'mlflow.db'}"


def shifted(library: Path, days: int) -> tuple[str, ...]:
    """Run a command under another date."""
    return ("env", f"LD_PRELOAD={library}", f"SHIFT_SECONDS={days * 86400}")


def following(events: queue.Queue[Event], kind: str) -> Event:
    while (event := events.get(timeout=120))["event"] != kind:
        assert event["event"] not in ("error", "lost", "alone"), event
    return event


@pytest.mark.parametrize("days", [(1, -1), (-1, 1)], ids=["owner ahead", "owner behind"])
@pytest.mark.parametrize("where", ["local", "server"])
def test_clocks_do_not_end_a_claim(
    where: str, days: tuple[int, int], library: Path, tmp_path: Path
) -> None:
    events: queue.Queue[Event] = queue.Queue()
    with place(where, tmp_path) as uri:
        owner, waiter = (
            Asker(number, uri, tmp_path, events, QUICK, shifted(library, day))
            for number, day in enumerate(days)
        )
        try:
            for _ in range(2):
                following(events, "ready")
            owner.ask(KEY, 0, seconds=4 * QUICK.beat_seconds)
            assert following(events, "trains")["asker"] == owner.number
            waiter.ask(KEY, 0, seconds=0.1)
            trained = following(events, "trained")
            reused = following(events, "reused")
            assert (trained["asker"], reused["asker"]) == (owner.number, waiter.number)
            assert reused["run_id"] == trained["run_id"]

            other = key_of("taken over")
            owner.ask(other, 0, seconds=60)
            second = following(events, "trains")
            waiter.ask(other, 0, seconds=0.1)
            owner.send(9)
            owner.process.wait()
            again = following(events, "trains")
            assert again["asker"] == waiter.number
            assert "was dead (process gone): taken over as generation 2" in again["line"]
            # The clocks differ indeed.
            began = [event["claim"]["since_ms"] for event in (second, again)]
            assert (began[1] - began[0]) / 86_400_000 == pytest.approx(days[1] - days[0], abs=0.01)
            following(events, "trained")
        finally:
            owner.close()
            waiter.close()


@pytest.mark.parametrize("days", [(1, -1), (-1, 1)], ids=["owner ahead", "owner behind"])
@pytest.mark.parametrize("where", ["local", "server"])
def test_an_owner_that_nobody_sees_is_dead_by_the_clock_of_the_store(
    where: str, days: tuple[int, int], library: Path, tmp_path: Path
) -> None:
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("pid namespaces are not permitted here")
    events: queue.Queue[Event] = queue.Queue()
    with place(where, tmp_path) as uri:
        owner, waiter = (
            Asker(number, uri, tmp_path, events, QUICK, (*shifted(library, day), *prefix))
            for number, (day, prefix) in enumerate(zip(days, (CONTAINER, ()), strict=True))
        )
        try:
            for _ in range(2):
                following(events, "ready")
            owner.ask(KEY, 0, seconds=600)
            following(events, "trains")
            waiter.ask(KEY, 0, seconds=0.1)
            assert following(events, "said")["asker"] == waiter.number  # it waits
            with pytest.raises(queue.Empty):
                events.get(timeout=QUICK.dead_after / 4)
            waiter.close()
            owner.send(9)
            owner.process.wait()
            time.sleep(QUICK.dead_after + QUICK.beat_seconds)
            # Who asks only now needs not wait for as long again.
            waiter = Asker(2, uri, tmp_path, events, QUICK, shifted(library, days[1]))
            following(events, "ready")
            began = time.monotonic()
            waiter.ask(KEY, 0, seconds=0.1)
            again = following(events, "trains")
            found = re.search(r"\(no sign of life for (\d+) s\): taken over", again["line"])
            assert found
            assert QUICK.dead_after <= int(found[1]) < 10 * QUICK.dead_after
            assert again["at"] - began < QUICK.dead_after
            following(events, "trained")
        finally:
            owner.close()
            waiter.close()
