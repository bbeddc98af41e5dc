"""A rank that ends, is suspended or goes silent is named; real processes on real connections."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import StoppedError
from runkey.training import rank_monitor
from runkey.training.rank_monitor import (
    Peer,
    RankMonitor,
    address_towards,
    connect_ranks,
    interface_of,
    local_peer,
)

TOKEN = "0123456789abcdef" * 2
REPOSITORY = Path(__file__).parents[2]


class Other:
    """Rank 1, a process that monitors this one; and this one's monitor of it, as rank 0."""

    def __init__(self, *, silent: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            mine = replace(local_peer(0), address="127.0.0.1", port=listener.getsockname()[1])
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.support.monitored", "1"),
                    *(json.dumps({0: mine.as_dict()}), TOKEN, str(silent)),
                ],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
            )
            # As if on another machine: its end is seen through the connection alone.
            peer = local_peer(1, self.process.pid)
            peer = replace(peer, process=replace(peer.process, namespace="pid:[1]"), host="node-b")
            peers = {0: mine, 1: peer}
            with socket.create_connection((mine.address, mine.port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: node-a\r\nAccept: */*\r\n\r\n")
                links = connect_ranks(0, peers, listener, TOKEN, 60)
        self.disconnected = threading.Event()
        self.monitor = RankMonitor(0, peers, links, disconnect=self.disconnected.set, grace=600)
        assert self.says() == "connected"

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


@pytest.fixture
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Other]:
    """Another rank; the parameter is the silence in seconds after which it finds this one lost."""
    monkeypatch.setattr(rank_monitor, "BEAT_SECONDS", 0.1)
    found = Other(silent=getattr(request, "param", 60.0))
    with closing(found.monitor):
        yield found
    found.process.kill()
    found.process.communicate()


def test_a_suspended_rank_is_named_and_what_waits_for_it_is_ended(other, monkeypatch):
    monkeypatch.setattr(rank_monitor, "SILENT_SECONDS", 1.0)
    os.kill(other.process.pid, signal.SIGSTOP)
    assert other.disconnected.wait(60)
    lost = other.monitor.lost()
    assert lost.rank == 1
    assert lost.text.startswith(f"rank 1 (process {other.process.pid} on node-b) gave no sign of ")
    assert lost.text.endswith("(suspended, swapping or cut off: look at node-b)")
    os.kill(other.process.pid, signal.SIGCONT)  # it learns that the others went on without it
    assert other.says() == f"the others ended without this rank: {lost.text}"


def test_a_rank_that_ends_on_another_machine_is_named(other):
    other.process.kill()
    assert other.monitor._found.wait(60)
    assert other.monitor.lost().text == (
        f"rank 1 (process {other.process.pid} on node-b) ended while training"
    )


def test_ranks_may_end_when_training_is_over(other):
    other.monitor.stand_down()
    other.process.kill()
    other.process.wait()
    other.monitor._thread.join(60)
    assert not other.disconnected.is_set()


def test_a_rank_that_cannot_be_reached_is_named():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    far = replace(local_peer(0), address="127.0.0.1", port=port)
    peers = {0: far, 1: local_peer(1)}
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(StoppedError, match=r"rank 0 \(process .*Connection refused\); MASTER_ADDR"),
    ):
        connect_ranks(1, peers, listener, TOKEN, 5)


def test_a_rank_that_does_not_connect_is_named():
    peers = {0: local_peer(0), 1: local_peer(1)}
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(StoppedError, match=r"rank 1 \(process .* does not connect to rank 0"),
    ):
        connect_ranks(0, peers, listener, TOKEN, 0.1)


def test_a_peer_is_what_was_sent():
    peer = replace(local_peer(3), address="10.0.0.4", port=29501)
    assert Peer.from_dict(json.loads(json.dumps(peer.as_dict()))) == peer


def test_the_interface_follows_from_the_address():
    assert address_towards("127.0.0.1", 29500, alone=True) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
