"""Real processes that ask for one key at the same time, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from runkey.registry.once import Rhythm

REPOSITORY = Path(__file__).resolve().parents[2]
CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Runs a command in a pid namespace of its own, as a container does."""
QUICK = Rhythm(beat_seconds=0.5, dead_after=30.0, poll_seconds=0.2)
_ENDS = ("trained", "reused", "lost", "alone", "error")

Event = dict[str, Any]


class Asker:
    """One process."""

    def __init__(
        self,
        number: int,
        uri: str,
        root: Path,
        events: queue.Queue[Event],
        rhythm: Rhythm,
        prefix: tuple[str, ...] = (),
    ) -> None:
        times = (rhythm.beat_seconds, rhythm.dead_after, rhythm.poll_seconds)
        command = [*prefix, sys.executable, "-m", "tests.support.asker", uri, str(root)]
        self.number = number
        self.process = subprocess.Popen(
            [*command, *map(str, times)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        self._events = events
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, key: str, at: float, seconds: float, **more: Any) -> None:
        assert self.process.stdin
        question = {"key": key, "at": at, "seconds": seconds, **more}
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        """End it however it is, and reap it: until here a killed one is a zombie."""
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout
        with contextlib.suppress(ValueError):  # closed
            for line in self.process.stdout:
                self._events.put({**json.loads(line), "asker": self.number})


@dataclass
class Outcome:
    """What one question to all came to."""

    events: list[Event]
    asked_at: float
    killed_at: float | None = None

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def shared(self) -> bool:
        """Whether everybody who did not train has the files of the one who did."""
        trained = {event["run_id"] for event in self.of("trained")}
        got = {(event["run_id"], event["weights"]) for event in self.of("reused")}
        return len(trained) == 1 and got <= {(run, run) for run in trained}

    @property
    def reactions(self) -> list[float]:
        """Seconds from the end of the training to each other's having the files."""
        end = self.of("trained")[0]["at"]
        return [event["at"] - end for event in self.of("reused")]

    @property
    def waits(self) -> list[float]:
        """Seconds from the question to having the files, for those who did not train."""
        return [event["at"] - self.asked_at for event in self.of("reused")]

    @property
    def takeover_seconds(self) -> float:
        """From the death of the owner to the beginning of the next training."""
        assert self.killed_at
        return float(self.of("trains")[-1]["at"]) - self.killed_at


@dataclass
class Askers:
    """Several processes, started once; a `with` block ends them."""

    uri: str
    root: Path
    count: int = 8
    rhythm: Rhythm = QUICK
    prefix: tuple[str, ...] = ()
    events: queue.Queue[Event] = field(default_factory=queue.Queue, init=False)
    askers: list[Asker] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        self.askers = [self._start(number) for number in range(self.count)]
        self._collect("ready", self.count)
        return self

    def __exit__(self, *error: object) -> None:
        for asker in self.askers:
            asker.close()

    def ask(self, key: str, seconds: float = 0.3, kill: bool = False) -> Outcome:
        """All ask at the same moment; `kill`: SIGKILL for the owner somewhere in its training.

        Args:
            key: asked for.
            seconds: how long a training takes.
            kill: whether the first owner dies.
        """
        outcome = Outcome([], time.monotonic() + 0.1)
        for asker in self.askers:
            asker.ask(key, outcome.asked_at, seconds)
        ends, expected, dead = 0, self.count, -1
        while ends < expected:
            event = self.events.get(timeout=120)
            outcome.events.append(event)
            ends += event["event"] in _ENDS
            if kill and event["event"] == "trains" and outcome.killed_at is None:
                time.sleep(random.uniform(0, seconds / 2))
                self.askers[event["asker"]].send(signal.SIGKILL)
                outcome.killed_at, dead = time.monotonic(), event["asker"]
                expected -= 1
        if outcome.killed_at is not None:
            self.askers[dead].close()
            self.askers[dead] = self._start(dead)
            self._collect("ready", 1)
        return outcome

    def _start(self, number: int) -> Asker:
        return Asker(number, self.uri, self.root, self.events, self.rhythm, self.prefix)

    def _collect(self, kind: str, count: int) -> list[Event]:
        found: list[Event] = []
        while len(found) < count:
            event = self.events.get(timeout=120)
            assert event["event"] == kind, event
            found.append(event)
        return found
