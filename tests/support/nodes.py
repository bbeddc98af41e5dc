"""Machines of a network, made of namespaces: each with its own network, process ids and host name.

    with Network(2) as network:
        process = network.nodes[0].start([sys.executable, "-m", "stages.train"], folder, ...)
        network.nodes[1].cut()

Needs root, `ip`, `unshare` and `nsenter`. Nothing outside the namespaces is changed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self


def why_not() -> str:
    """Why machines cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "namespaces with networks need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)}: not installed"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--uts", "--fork", "--mount-proc", "true"],
        capture_output=True,
        check=False,
    )
    return "" if tried.returncode == 0 else "this container allows no namespaces"


class Node:
    """A machine: what keeps its namespaces, and its end of a cable to the switch."""

    def __init__(self, number: int, switch: int) -> None:
        self.name, self.address = f"node-{number}", f"10.77.0.{number + 1}"
        self._switch, self._port = switch, f"port{number}"
        self._keeper, self.pid = _keep("--net", "--uts", "--pid", "--fork", "--mount-proc")
        self._started: list[subprocess.Popen[bytes]] = []
        self.run("hostname", self.name)
        peer = ("peer", "eth0", "netns", str(self.pid))
        _enter(switch, "ip", "link", "add", self._port, "type", "veth", *peer)
        _enter(switch, "ip", "link", "set", self._port, "master", "switch", "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "route", "add", "default", "dev", "eth0")

    def run(self, *command: str) -> str:
        """Run a command on the machine; it must succeed."""
        return _run(*self._enter(), *command)

    def start(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], output: IO[Any]
    ) -> subprocess.Popen[bytes]:
        """Start a process; both its streams go to a file. Signals reach it by `signal` alone."""
        process = subprocess.Popen(
            [*self._enter(f"--wd={folder}"), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        self._started.append(process)
        return process

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the machine but the one that keeps it."""
        # -1 is all processes of the namespace, without process 1 and the sender.
        self.run("sh", "-c", f"kill -{number.value} -1 || true")
        if number == signal.SIGCONT:  # nsenter stops when what it started does
            for process in self._started:
                process.send_signal(number)

    def _enter(self, *options: str) -> list[str]:
        kinds = ("--net", "--pid", "--uts", "--mount")
        return ["nsenter", *kinds, "--target", str(self.pid), *options, "--"]

    def cut(self) -> None:
        """Pull the cable: both ends see that the link is down."""
        _enter(self._switch, "ip", "link", "set", self._port, "down")

    def drop(self) -> None:
        """Let the switch drop what comes and goes: the link looks fine."""
        _enter(self._switch, "ip", "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        """Undo `cut` and `drop`."""
        _enter(self._switch, "ip", "link", "set", self._port, "master", "switch", "up")

    def shape(self, *discipline: str) -> None:
        """Make the cable slow, in both directions: arguments of `tc qdisc ... root`."""
        _enter(self._switch, "tc", "qdisc", "replace", "dev", self._port, "root", *discipline)
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", *discipline)

    def close(self) -> None:
        """Kill the machine with all its processes."""
        os.kill(self.pid, signal.SIGKILL)  # process 1 of its namespace: all others go with it
        for process in self._started:  # once nsenter, which stops like what it started, notices
            process.send_signal(signal.SIGCONT)
        self._keeper.wait()


class Network:
    """Machines at one switch, which is a namespace too."""

    def __init__(self, size: int) -> None:
        self._keeper, self.pid = _keep("--net")
        self.nodes: list[Node] = []
        try:
            _enter(self.pid, "ip", "link", "add", "switch", "type", "bridge")
            _enter(self.pid, "ip", "link", "set", "switch", "up")
            for number in range(size):
                self.nodes.append(Node(number, self.pid))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all machines."""
        for node in self.nodes:
            node.close()
        self._keeper.kill()
        self._keeper.wait()


def _keep(*options: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a process that keeps new namespaces; return it and the id of one inside them."""
    keeper = subprocess.Popen(
        ["unshare", *options, "sh", "-c", "echo ready; exec sleep infinity"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # at its end: "sigprocmask unblock failed"
    )
    assert keeper.stdout
    assert keeper.stdout.readline() == b"ready\n"
    if "--fork" not in options:
        return keeper, keeper.pid
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
    return keeper, int(children[0])


def _enter(pid: int, *command: str) -> None:
    _run("nsenter", "--net", "--target", str(pid), "--", *command)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
