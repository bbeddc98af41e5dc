"""A Slurm of one node, in a folder of its own: no systemd, no fixed ports, torn down whole."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runkey.tracking.store import free_port
from tests.support.project import wait_for

needs_slurm = pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.geteuid() != 0,
    reason="no Slurm, or not root; on Debian: apt-get install slurmctld slurmd munge",
)

CONFIG = """\
ClusterName=runkey
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdTimeout=20
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={mib} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The controller, and a node with a pid namespace of its own, so that it dies as a machine."""

    def __init__(self, folder: Path, cpus: int = 2, mib: int = 8000) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool"):
            (folder / name).mkdir()
        text = CONFIG.format(
            host=self.host,
            control=free_port(),
            daemon=free_port(),
            folder=folder,
            cpus=cpus,
            mib=mib,
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self._munge = self._start(
            *("munged", "--foreground", "--force", "--num-threads=2"),
            f"--socket={folder}/munge.socket",
            f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/munged.log",
        )
        wait_for((folder / "munge.socket").exists, "munged's socket")
        self._control = self._start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        self.start_node()

    def start_node(self) -> None:
        """Start slurmd, as when the machine boots."""
        own_pids = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
        self._node = self._start(
            *own_pids, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", self.host
        )
        wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T") in ("idle", "mixed"), "the node")

    def kill_node(self) -> None:
        """Kill everything on the node at once."""
        self._node.kill()
        self._node.wait()

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    def stop(self) -> None:
        for process in (self._node, self._control, self._munge):
            process.send_signal(signal.SIGKILL)
            process.wait()

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            return subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # A short path: sockets have short names.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        running = Slurm(Path(name))
        try:
            yield running
        finally:
            running.stop()
