"""Notice within seconds that another rank of a training ended, is suspended, or is cut off.

    links = connect_ranks(rank, peers, listener, token)      # one TCP connection to each other rank
    with closing(RankMonitor(rank, peers, links)) as monitor: ...

Each rank sends a beat to every other one and names the first that is silent for too long; what one
rank finds it passes on, so that all name the same. A process of this machine is also watched
through the kernel (pidfd), which knows at once when it ends. Nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from runkey.errors import TRY_ELSEWHERE, StoppedError
from runkey.processes import Process, this_process

BEAT_SECONDS = 2.0
"""Between two beats of a rank."""
SILENT_SECONDS = 20.0
"""A rank that sends nothing for so long counts as lost; time in which this one was suspended, too,
does not count."""
WAKE = signal.SIGURG
"""Interrupts what the main thread may give up (`Interrupts.at_once`); ignored by default."""

_NOTICE_SECONDS = 5.0
"""Time for a dying process to be gone after its connection broke."""
_END_SECONDS = 10.0
"""Time for this process to notice by itself; a GPU that waits for a dead rank never does."""
_LONGEST_NEWS = 4096


class LostRank(NamedTuple):
    """A rank that training cannot go on with."""

    rank: int
    text: str
    """In words."""
    ended: bool = False
    """Its process ended, so that the system has closed its connections."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A rank, as it introduces itself to the others."""

    rank: int
    process: Process
    host: str
    address: str = ""
    """IP address at which it can be reached."""
    port: int = 0

    @property
    def label(self) -> str:
        """For messages."""
        return f"rank {self.rank} (process {self.process.pid} on {self.host})"

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return the peer that `as_dict` gave."""
        return cls(**{**stored, "process": Process(**stored["process"])})


def local_peer(rank: int, pid: int | None = None) -> Peer:
    """Return a rank of this machine: this process, or the one with an id."""
    return Peer(rank=rank, process=this_process(pid), host=socket.gethostname())


def ended(peer: Peer) -> LostRank:
    """Return a rank whose process is gone."""
    return LostRank(peer.rank, f"{peer.label} ended while training", ended=True)


class RankMonitor:
    """A thread that notices when another rank is lost.

    When one is, it interrupts what this process waits for. If that does not notice within some
    seconds (a GPU that waits for a dead rank never does), the thread ends it.
    """

    def __init__(
        self,
        rank: int,
        peers: Mapping[int, Peer],
        links: Mapping[int, socket.socket] | None = None,
        *,
        disconnect: Callable[[], None] = lambda: None,
        grace: float = _END_SECONDS,
    ) -> None:
        """Start to monitor other ranks, by their number.

        Args:
            rank: of this process; among `peers` it is left out.
            peers: who is monitored.
            links: connections to them, from `connect_ranks`, which the monitor closes.
            disconnect: ends all waiting of this process for other ranks.
            grace: seconds for this process to end by itself when another one is lost.
        """
        self._rank, self._peers, self._grace = rank, peers, grace
        self._links = {number: _Link(peers[number], link) for number, link in (links or {}).items()}
        self.disconnect = disconnect
        self._lost: LostRank | None = None
        self._found, self._stood_down = threading.Event(), threading.Event()
        self._processes: dict[int, LostRank] = {}
        here = this_process()
        for number, peer in peers.items():
            if number != rank and peer.process != here and here.is_beside(peer.process):
                try:
                    self._processes[os.pidfd_open(peer.process.pid)] = ended(peer)
                except ProcessLookupError:
                    self._lost = ended(peer)
        self._wake = os.eventfd(0)
        self._open = [*self._processes, self._wake]
        self._thread = threading.Thread(target=self._monitor, name="rank monitor", daemon=True)
        self._thread.start()

    def lost(self) -> LostRank | None:
        """Return which rank is lost, if any; the caller ends this process itself."""
        self._stood_down.set()
        self._found.wait(_NOTICE_SECONDS)
        return self._lost

    def found(self) -> LostRank | None:
        """Return which rank is lost as far as is known, without waiting."""
        return self._lost if self._found.is_set() else None

    def stand_down(self) -> None:
        """Let other ranks end from here on: training is over."""
        self._stood_down.set()

    def close(self) -> None:
        """Stop monitoring, if that has not been done yet."""
        self._stood_down.set()
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        while self._open:
            os.close(self._open.pop())
        for link in self._links.values():
            link.socket.close()

    def _monitor(self) -> None:
        self._lost = lost = self._lost or self._wait()
        if lost is None:
            return
        for link in self._links.values():  # the one that is lost may come back and read it
            link.send(f"{lost.rank} {lost.ended:d} {lost.text}\n")
        self._found.set()
        _interrupt_main_thread()
        # A connection that is cut, or that leads to a suspended process, stays open.
        if self._stood_down.wait(_NOTICE_SECONDS if lost.ended else 0):
            return
        self.disconnect()
        if self._stood_down.wait(min(_END_SECONDS, self._grace)):
            return
        if self._grace > _END_SECONDS:
            _print(f"{lost.text}; rank {self._rank} ends when its step or evaluation is done")
            if self._stood_down.wait(self._grace):
                return
        _print(f"error: {lost.text}, and rank {self._rank} waited for it: ended, too")
        os._exit(TRY_ELSEWHERE)

    def _wait(self) -> LostRank | None:
        """Send beats until a rank is lost; None: monitoring was stopped."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ, None)
            for descriptor, lost in self._processes.items():
                selector.register(descriptor, selectors.EVENT_READ, lost)
            for link in self._links.values():
                selector.register(link.socket, selectors.EVENT_READ, link)
            looked = sent = _clock()
            for link in self._links.values():
                link.heard = looked
            while True:
                ready = selector.select(BEAT_SECONDS / 2 if self._links else None)
                before, looked = looked, _clock()
                if looked - before > SILENT_SECONDS / 2:  # suspended, so it heard none
                    for link in self._links.values():
                        link.heard = looked
                for key, _ in ready:
                    if key.data is None:
                        return None
                    lost = key.data if isinstance(key.data, LostRank) else key.data.read(looked)
                    if lost:
                        return self._named(lost)
                if looked - sent >= BEAT_SECONDS:
                    sent = looked
                    for link in self._links.values():
                        link.send("\n")
                for link in self._links.values():
                    if looked - link.heard > SILENT_SECONDS:
                        return _silent(link.peer, looked - link.heard)

    def _named(self, lost: LostRank) -> LostRank:
        """Return what was found, in other words if it is this rank that the others found lost."""
        if lost.rank != self._rank:
            return lost
        return lost._replace(text=f"the others ended without this rank: {lost.text}")


def _silent(peer: Peer, seconds: float) -> LostRank:
    text = (
        f"{peer.label} gave no sign of life for {seconds:.0f} s (suspended, swapping or cut off:"
        f" look at {peer.host})"
    )
    return LostRank(peer.rank, text)


class _Link:
    """The connection to another rank: lines, each empty (a beat) or the news of a lost rank."""

    def __init__(self, peer: Peer, connection: socket.socket) -> None:
        self.peer, self.socket = peer, connection
        self.heard = 0.0
        self._rest = b""
        connection.setblocking(False)
        # Ahead of gradients, where a queue of the network has priorities.
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)

    def send(self, text: str) -> None:
        with suppress(OSError):  # whether somebody is there is known from what is received
            self.socket.send(text.encode())

    def read(self, now: float) -> LostRank | None:
        """Take what has come; return who is lost, if somebody is."""
        try:
            data = self.socket.recv(_LONGEST_NEWS)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionError:
            return ended(self.peer)
        except OSError as error:
            text = f"{self.peer.label} cannot be reached any more ({error.strerror})"
            return LostRank(self.peer.rank, text)
        if not data:
            return ended(self.peer)
        self.heard = now
        *lines, self._rest = (self._rest + data)[-_LONGEST_NEWS:].split(b"\n")
        for line in filter(None, lines):
            number, has_ended, text = line.decode(errors="replace").split(" ", 2)
            return LostRank(int(number), text, ended=has_ended == "1")
        return None


def _interrupt_main_thread() -> None:
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, WAKE)


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _clock() -> float:
    """Return the seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# Connections between all ranks.

_HELLO = struct.Struct("!32sI")
"""Token of the training, rank."""


def connect_ranks(
    rank: int, peers: Mapping[int, Peer], listener: socket.socket, token: str, seconds: float
) -> dict[int, socket.socket]:
    """Connect to every other rank; all ranks call this.

    Args:
        rank: of this process.
        peers: all ranks, with their addresses.
        listener: accepts connections at this rank's address, with a backlog for all ranks.
        token: 32 characters that tell this training's ranks from any other process.
        seconds: how long to wait for the others.

    Raises:
        StoppedError: a rank cannot be reached, or does not come.
    """
    links: dict[int, socket.socket] = {}
    end = time.monotonic() + seconds
    try:
        for peer in (peers[number] for number in range(rank)):
            try:
                link = socket.create_connection((peer.address, peer.port), timeout=seconds)
            except OSError as error:
                raise StoppedError(
                    f"{peer.label} cannot be reached at {peer.address}:{peer.port} from"
                    f" {socket.gethostname()} ({error.strerror or error}); MASTER_ADDR must be an"
                    " address of rank 0 in a network that connects all machines, without a firewall"
                ) from None
            link.sendall(_HELLO.pack(token.encode(), rank))
            links[peer.rank] = link
        while missing := [peers[number] for number in sorted(peers.keys() - links.keys() - {rank})]:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                link, _ = listener.accept()
                link.settimeout(_NOTICE_SECONDS)
                known, number = _HELLO.unpack(link.recv(_HELLO.size, socket.MSG_WAITALL))
            except (ConnectionError, struct.error):
                continue  # not a rank
            except TimeoutError:
                if time.monotonic() < end:
                    continue
                raise StoppedError(f"{missing[0].label} does not connect to rank {rank}") from None
            if known == token.encode() and number in peers and number not in links:
                links[number] = link
            else:
                link.close()
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return links


def address_towards(host: str, port: int, *, alone: bool) -> str:
    """Return this machine's IP address on the route to another one.

    A name of this machine often stands for a loopback address, at which no other machine reaches
    it: unless all ranks are on it (`alone`), the address of the default route is returned then.
    Raises OSError if a name cannot be resolved, or there is no route.
    """
    family, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    address = _source(family, target)
    if address.startswith("127.") and not alone:
        with suppress(OSError):
            return _source(socket.AF_INET, ("192.0.2.1", 9))  # TEST-NET-1: nothing is sent
    return address


def _source(family: int, target: Any) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the network interface that has an IPv4 address; None: none, or it is IPv6."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


_SIOCGIFADDR = 0x8915
