"""A Ray cluster of nodes that die as machines do: each has its own address, pids and folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runkey.tracking.store import free_port
from tests.support.project import REPOSITORY

RAY = REPOSITORY / ".venv-ray/bin/ray"
needs_ray = pytest.mark.skipif(
    not RAY.exists() or not shutil.which("unshare") or os.geteuid() != 0,
    reason="`make env-ray` installs Ray; its nodes here are namespaces, which need root",
)
# Nodes of one cluster use one path for their files; here each has another folder under it.
IN_NAMESPACE = 'mkdir -p "$1" "$2" && mount --bind "$1" "$2" && shift 2 && exec "$@"'


class RayCluster:
    """The head, and nodes that join it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.2:{self.port}"
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start(self, repository: Path, cpus: int = 1, memory: int = 4 * 2**30) -> None:
        """Start another node; the first one is the head."""
        number = len(self.nodes)
        options = [f"--node-ip-address=127.0.0.{number + 2}", f"--num-cpus={cpus}"]
        options += [f"--memory={memory}", f"--object-store-memory={80 * 2**20}", "--block"]
        options += ["--disable-usage-stats"]
        common = self.folder / "ray"
        if number:
            own = self.folder / f"node{number}"
            prefix = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
            prefix += ["sh", "-c", IN_NAMESPACE, "sh", str(own), str(common)]
            options += [f"--address={self.address}"]
        else:
            prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
            options += ["--head", f"--port={self.port}", f"--temp-dir={common}"]
            options += ["--include-dashboard=false"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        with (self.folder / f"node{number}.out").open("wb") as out:
            process = subprocess.Popen(
                [*prefix, str(RAY), "start", *options],
                env=environment | {"RUNKEY_REPOSITORY": str(repository)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.nodes.append(process)

    def has_joined(self, number: int) -> bool:
        """Whether a node has said that it runs."""
        assert self.nodes[number].poll() is None, (self.folder / f"node{number}.out").read_text()
        return "Ray runtime started" in (self.folder / f"node{number}.out").read_text()

    def kill(self, number: int) -> None:
        """Kill everything on a node at once."""
        self.nodes[number].kill()
        self.nodes[number].wait()

    def stop(self) -> None:
        for number in reversed(range(len(self.nodes))):
            self.kill(number)


@pytest.fixture
def ray_cluster() -> Iterator[RayCluster]:
    # A short path: sockets have short names.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:
        running = RayCluster(Path(name))
        try:
            yield running
        finally:
            running.stop()
